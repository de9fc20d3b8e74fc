"""Command line of the image builder: `python3 -m rootfs build NAME`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rootfs.apt import find_mirror
from rootfs.build import GUEST_DIR, Builder
from rootfs.errors import BuildError
from rootfs.flavours import FLAVOURS
from rootfs.progress import say

_IMAGES_DIR = os.environ.get("SANDBOXD_IMAGES__IMAGES_DIR") or "/var/lib/sandboxd/images"
_CACHE_DIR = "/var/cache/sandboxd/rootfs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. The last line on standard output is the result, as JSON."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        if os.geteuid() != 0:
            raise BuildError("building an image needs root (it installs packages into a tree): use sudo")
        mirror = find_mirror(options.mirror)
        builder = Builder(options.images_dir.absolute(), options.cache_dir.absolute(), mirror, options.guest_dir)
        flavour = FLAVOURS[options.name]
        result = builder.check(flavour) if options.check else builder.build(flavour)
    except BuildError as e:
        say(f"failed: {e}")
        return 1
    except OSError as e:
        hint = ": free space, or use --images-dir and --cache-dir" if e.errno == errno.ENOSPC else ""
        say(f"failed: {e}{hint}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was changed")
        return 130
    print(json.dumps(dataclasses.asdict(result)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m rootfs", description="Builds the images that sandboxes boot.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="build and publish an image, unless it is up to date")
    build.add_argument("name", choices=sorted(FLAVOURS), help="the flavour")
    build.add_argument("--images-dir", type=Path, default=Path(_IMAGES_DIR), help="where to publish (%(default)s)")
    build.add_argument("--cache-dir", type=Path, default=Path(_CACHE_DIR), help="packages and steps kept (%(default)s)")
    build.add_argument("--guest-dir", type=Path, default=GUEST_DIR, help="the guest package to install (%(default)s)")
    build.add_argument("--mirror", help="URL of a Debian archive; default: the one in this machine's apt configuration")
    build.add_argument("--check", action="store_true", help="also build without caches, and fail if the result differs")
    return parser


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """End the build as Ctrl-C does, so that temporary directories are removed (handler of SIGTERM)."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
