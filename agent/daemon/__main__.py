"""Command `sandboxd`: read the settings and run the daemon. Exit status 2: invalid settings; 1: it cannot start."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from agent.common.config.loading import load
from agent.common.errors import AgentError, ConfigError


def main() -> None:
    """Parse the command line and run the daemon."""
    parser = argparse.ArgumentParser(prog="sandboxd", description="Node agent for microVM sandboxes.")
    parser.add_argument("--config", type=Path, help="TOML file (default: /etc/sandboxd/config.toml, if it exists)")
    parser.add_argument("--check", action="store_true", help="check the settings and exit")
    parser.add_argument("--delete-all", action="store_true", help="delete the sandboxes of an earlier daemon and exit")
    arguments = parser.parse_args()
    try:
        settings = load(arguments.config)
        if arguments.check:
            return
        from agent.daemon.app import delete_all, run  # only now: it loads gRPC, which --check does not need

        if arguments.delete_all:
            asyncio.run(delete_all(settings))
        else:
            asyncio.run(run(settings, lambda: load(arguments.config)))
    except ConfigError as error:
        sys.exit(_report(error, 2))
    except (AgentError, OSError) as error:
        sys.exit(_report(error, 1))


def _report(error: Exception, status: int) -> int:
    sys.stderr.write(f"sandboxd: {error}\n")
    return status


if __name__ == "__main__":
    main()
