#!/bin/busybox sh
# First program of the guest: load the modules, mount the root disk, and start the guest's init.
# Short, since each command is a fork, which is slow under emulation. If this script ends, the kernel panics and the VMM
# ends; the reason is the last line on the console.

fail() {
    echo "sandboxd initramfs: $*" >/dev/console
    exit 1
}

mount -t devtmpfs devtmpfs /dev || fail "cannot mount /dev"
mount -t proc proc /proc || fail "cannot mount /proc"
mount -t sysfs sysfs /sys || fail "cannot mount /sys"

modules="@BASE_MODULES@"
read -r cmdline </proc/cmdline
case " $cmdline " in
*" sandboxd.link=vsock "*) modules="$modules @VSOCK_MODULES@" ;;
esac
for module in $modules; do
    insmod "/modules/$module.ko" || fail "cannot load module $module"
done

# The root disk is found by its serial, as the order of disks may vary. Its driver may still be probing it.
find_root() {
    for disk in /sys/block/vd*; do
        serial=
        [ -r "$disk/serial" ] && read -r serial <"$disk/serial"
        [ "$serial" = root ] && root="/dev/${disk##*/}" && return 0
    done
    return 1
}
tries=0
until find_root; do
    tries=$((tries + 1))
    [ "$tries" -le 200 ] || fail "no disk has the serial 'root'"
    sleep 0.02
done

mount -t erofs -o ro "$root" /newroot || fail "cannot mount $root"
umount /proc /sys || fail "cannot unmount /proc and /sys"
mount -o move /dev /newroot/dev || fail "cannot move /dev"
exec switch_root /newroot /usr/bin/python3 -I -S /usr/lib/sandboxd/run.py
fail "cannot start the guest's init"
