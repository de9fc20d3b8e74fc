"""`sandboxd-gateway`: the API of the Deno Sandbox SDKs. Exit status 2 for wrong settings, 1 if it cannot start."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from agent.common.config.loading import load
from agent.common.config.settings import Settings
from agent.common.errors import AgentError, ConfigError


async def _run(settings: Settings) -> None:
    from agent.common import telemetry
    from agent.common.background import QUICK, Supervisor
    from agent.common.config.daemon import MetricsSettings
    from agent.common.systemd import keep_watchdog, notify
    from agent.gateway.app import gateway
    from agent.gateway.metrics import BACKGROUND_FAILING, BACKGROUND_FAILURES

    # [metrics] is the daemon's; the gateway has gateway.metrics_address.
    telemetry.setup(settings.log, MetricsSettings(), settings.tracing, settings.node.name, "sandboxd-gateway")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    observer = telemetry.LoopTelemetry(BACKGROUND_FAILURES, BACKGROUND_FAILING)
    async with Supervisor(observer) as supervisor, gateway(settings, supervisor) as ports:
        telemetry.log.info("ready", **ports)
        notify("READY=1")
        watchdog = supervisor.start("systemd-watchdog", keep_watchdog, QUICK)
        await stop.wait()
        await watchdog.stop()
        notify("STOPPING=1")


def main() -> None:
    """Run `sandboxd-gateway`."""
    parser = argparse.ArgumentParser(prog="sandboxd-gateway", description="Serves the Deno Sandbox SDKs.")
    parser.add_argument("--config", type=Path, help="TOML file (default: /etc/sandboxd/config.toml, if it exists)")
    parser.add_argument("--check", action="store_true", help="check the settings and exit")
    arguments = parser.parse_args()
    try:
        settings = load(arguments.config)
        if not arguments.check:
            asyncio.run(_run(settings))
    except ConfigError as error:
        sys.exit(_report(error, 2))
    except (AgentError, OSError) as error:
        sys.exit(_report(error, 1))


def _report(error: Exception, status: int) -> int:
    sys.stderr.write(f"sandboxd-gateway: {error}\n")
    return status


if __name__ == "__main__":
    main()
