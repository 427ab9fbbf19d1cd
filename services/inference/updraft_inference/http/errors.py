"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` with an HTTP status."""

from updraft_chassis.errors import Exhausted, InvalidInput, Unavailable, UpdraftError

_RETRY_AFTER_S = 1
"""A queue moves within a second, and clients add their own backoff."""


class ApiError(Exception):
    """An error that a client can act on. `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, object]:
        return {
            "error": {
                "message": self.message,
                "type": _error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def api_error(error: UpdraftError) -> ApiError:
    match error:
        case InvalidInput():
            return invalid(str(error))
        case Exhausted():
            return ApiError(429, str(error), code="rate_limit_exceeded", retry_after_s=_RETRY_AFTER_S)
        case Unavailable():
            retry_after_s = max(_RETRY_AFTER_S, round(error.retry_after_s or 0))
            return ApiError(503, str(error), code="unavailable", retry_after_s=retry_after_s)
        case _:
            return ApiError(500, str(error), code="internal_error")


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
