// A peer that speaks hashicorp/yamux, the reference implementation, for tests/unit/guest/test_yamux_interop.py.
//
//	yamux_peer server SOCKET            serves the streams that the test opens, each by its first byte
//	yamux_peer client SOCKET SCENARIO   opens streams to the test's echo server; status 0 if all went well
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

const mib = 1 << 20

var (
	released   = make(chan struct{})
	lastErrors = make(chan error, 16)
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func run(args []string) error {
	conn, err := net.Dial("unix", args[1])
	if err != nil {
		return err
	}
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	if args[0] == "server" {
		session, err := yamux.Server(conn, config)
		if err != nil {
			return err
		}
		for {
			stream, err := session.AcceptStream()
			if err != nil {
				return nil // the test hung up
			}
			go serve(session, stream)
		}
	}
	session, err := yamux.Client(conn, config)
	if err != nil {
		return err
	}
	defer session.Close()
	return map[string]func(*yamux.Session) error{
		"bulk": bulk, "many": many, "ping": ping, "reset": reset, "late": late,
	}[args[2]](session)
}

func serve(session *yamux.Session, stream *yamux.Stream) {
	command := make([]byte, 1)
	if _, err := io.ReadFull(stream, command); err != nil {
		return
	}
	switch command[0] {
	case 'e': // echo
		io.Copy(stream, stream)
	case 'w': // read only once somebody says 'g', then answer as 'd' does
		<-released
		digest(stream)
	case 'g':
		close(released)
	case 'd': // read to the end, answer with count and digest
		digest(stream)
	case 'n': // send as many bytes as asked for
		var count uint64
		binary.Read(stream, binary.BigEndian, &count)
		chunk := bytes.Repeat([]byte("0123456789abcdef"), 4096)
		for ; count > 0; count -= uint64(len(chunk)) {
			if count < uint64(len(chunk)) {
				chunk = chunk[:count]
			}
			stream.Write(chunk)
		}
	case 'r': // wait for a reset
		_, err := io.Copy(io.Discard, stream)
		lastErrors <- err
	case 'q': // what the last 'r' saw
		fmt.Fprint(stream, <-lastErrors)
	case 'p':
		if _, err := session.Ping(); err == nil {
			fmt.Fprint(stream, "pong")
		}
	case 'a':
		session.GoAway()
	}
	stream.Close()
}

func digest(stream *yamux.Stream) {
	hash := sha256.New()
	count, _ := io.Copy(hash, stream)
	binary.Write(stream, binary.BigEndian, uint64(count))
	stream.Write(hash.Sum(nil))
}

// echo sends size bytes, compares what comes back, and closes. (This version of the reference reads nothing more after
// its own Close, so it cannot close its half first.)
func echo(stream *yamux.Stream, size int, seed byte) error {
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i>>8) ^ byte(i) ^ seed
	}
	failed := make(chan error, 1)
	go func() {
		_, err := stream.Write(data)
		failed <- err
	}()
	back := make([]byte, size)
	count, err := io.ReadFull(stream, back)
	if err := <-failed; err != nil {
		return err
	}
	if err == nil && !bytes.Equal(back, data) {
		err = errors.New("other bytes came back than were sent")
	}
	if err != nil {
		return fmt.Errorf("%d of %d bytes: %w", count, size, err)
	}
	return stream.Close()
}

func bulk(session *yamux.Session) error {
	stream, err := session.OpenStream()
	if err != nil {
		return err
	}
	return echo(stream, 64*mib, 1)
}

func many(session *yamux.Session) error {
	var group sync.WaitGroup
	failures := make(chan error, 200)
	for i := 0; i < 200; i++ {
		stream, err := session.OpenStream()
		if err != nil {
			return err
		}
		group.Add(1)
		go func(i int) {
			defer group.Done()
			if err := echo(stream, i*997, byte(i)); err != nil {
				failures <- fmt.Errorf("stream %d: %w", i, err)
			}
		}(i)
	}
	group.Wait()
	close(failures)
	return <-failures
}

func ping(session *yamux.Session) error {
	for i := 0; i < 10; i++ {
		if _, err := session.Ping(); err != nil {
			return err
		}
	}
	return nil
}

// reset asks the test to reset the stream; others must go on.
func reset(session *yamux.Session) error {
	stream, err := session.OpenStream()
	if err != nil {
		return err
	}
	if _, err := stream.Write([]byte("RESET")); err != nil {
		return err
	}
	if _, err := io.ReadAll(stream); !errors.Is(err, yamux.ErrConnectionReset) {
		return fmt.Errorf("not a reset: %v", err)
	}
	return bulk(session)
}

// late leaves what comes back unread, so that the test's window fills, while another stream goes on.
func late(session *yamux.Session) error {
	slow, err := session.OpenStream()
	if err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() {
		_, err := slow.Write(make([]byte, 2*mib))
		written <- err
	}()
	if err := bulk(session); err != nil {
		return err
	}
	select {
	case err := <-written:
		return fmt.Errorf("two MiB went through a window that nobody empties: %v", err)
	case <-time.After(10 * time.Millisecond):
	}
	if _, err := io.ReadFull(slow, make([]byte, 2*mib)); err != nil {
		return err
	}
	if err := <-written; err != nil {
		return err
	}
	return slow.Close()
}
