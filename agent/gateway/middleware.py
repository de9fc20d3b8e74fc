"""HTTP middleware in front of all handlers: authentication by bearer token, errors as JSON, one span per request."""

from __future__ import annotations

import secrets

import grpc
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from agent.common.telemetry import log, tracer
from agent.common.tokens import Token, TokenFile, TokenFileError
from agent.gateway.errors import HttpError, http_error_from_rpc
from agent.gateway.metrics import REFUSALS

TOKEN: web.RequestKey[Token] = web.RequestKey("token", Token)


def guard(tokens: TokenFile) -> Middleware:
    """Return a middleware that sets `request[TOKEN]`, and answers every error with {"code", "message"}."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            request[TOKEN] = _authenticate(request, tokens)
            with tracer.start_as_current_span(f"gateway {request.method}"):
                return await handler(request)
        except HttpError as error:
            return _error_response(error)
        except grpc.aio.AioRpcError as error:
            return _error_response(http_error_from_rpc(error))
        except TokenFileError as error:
            log.error("cannot read the token file", error=error.message)
            return _error_response(
                HttpError(500, error.reason, "the gateway cannot read its tokens; tell its operator")
            )
        except web.HTTPException as error:
            return _error_response(_from_aiohttp(request, error))
        except Exception as error:  # noqa: BLE001  details of a bug belong in the log, not in the response
            incident = secrets.token_hex(4)
            log.error("internal error", incident=incident, path=request.path, exc_info=error)
            return _error_response(
                HttpError(500, "INTERNAL", f"internal error, incident {incident}: see the gateway's log")
            )

    return middleware


def _authenticate(request: web.Request, tokens: TokenFile) -> Token:
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    token = tokens.check(text.strip()) if scheme.lower() == "bearer" else None
    if token is None:
        raise HttpError(401, "INVALID_TOKEN", "the token is missing, wrong, or was revoked")
    org = request.headers.get("X-Deno-Org")
    if org is not None and org != token.org:
        raise HttpError(403, "WRONG_ORG", f"the token is not for the organization {org[:64]!r}")
    return token


def _error_response(error: HttpError) -> web.Response:
    REFUSALS.labels(error.code).inc()
    return web.json_response({"code": error.code, "message": error.message}, status=error.status)


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> HttpError:
    if error.status == 404:
        target = f"{request.method} {request.path[:100]}"
        return HttpError(404, "NOT_SUPPORTED", f"sandboxd does not serve {target}: see docs/deno-sdk.md for its API")
    return HttpError(error.status, error.reason.upper().replace(" ", "_"), error.text or error.reason)
