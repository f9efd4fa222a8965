"""Credentials: how they are known when seen, so that none is written to a file or a log.

Two ways to deal with one. A config that holds one is refused (`credentials`), since config.json is read back when a run
goes on, and what is blanked out there could not be used. Text on its way to people and logs has it blanked out
(`redacted`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

BLANK = "***"

# Words that make a name one of a secret; words of a name are parted by _ . - or a capital. Names of ours that have such
# a word in passing (rows.tokens, tokenizer.name, qk_norm, key_every, "tokens_seen") have none of these on its own.
_WORDS = {"token", "secret", "secrets", "password", "passwd", "passphrase"}
_WORDS |= {"credential", "credentials", "authorization"}
_PAIRS = {
    ("api", "key"),
    ("access", "key"),
    ("private", "key"),
    ("secret", "key"),
    ("account", "key"),
    ("storage", "key"),
    ("sas", "key"),
    ("ssh", "key"),
    ("signing", "key"),
    ("encryption", "key"),
}
_JOINED = {"apikey", "accesskey", "secretkey", "privatekey", "authtoken", "accesstoken", "bearertoken"}

# Values that are known by their form: what a service's own documentation says its keys look like.
_FORMS = (
    r"hf_[A-Za-z0-9]{20,}",  # Hugging Face
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}",  # GitHub
    r"glpat-[A-Za-z0-9_-]{16,}",  # GitLab
    r"sk-[A-Za-z0-9_-]{20,}",  # several makers of language models
    r"(?:AKIA|ASIA)[A-Z0-9]{16}",  # AWS
    r"AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,}",  # Google
    r"xox[abposr]-[A-Za-z0-9-]{10,}",  # Slack
    r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+",  # a JSON web token
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
)
_VALUE = re.compile("|".join(rf"(?<![A-Za-z0-9]){form}" for form in _FORMS))
_USER = re.compile(  # before the host of a URL: user:password, or a name as long as keys are
    r"(?<=://)(?:[^/?#\s'\"@:]*:(?!\d+/)[^\s'\"@]*|[^/?#\s'\"@:]{16,})@"
)
_NAMED = re.compile(  # name=value and name: value; also in a URL's query, in JSON and in a header
    r"(?<![A-Za-z0-9_.-])(?P<name>[A-Za-z0-9_.-]++)(?P<between>['\"]?\s*+[=:]\s*+['\"]?(?:(?:Bearer|Basic)\s++)?)"
    r"(?P<value>[^\s'\"&#,;)}\]]++)"
)
_QUERY = {"sig", "signature", "key", "auth"} | {
    f"x-{whose}-{what}" for whose in ("amz", "goog") for what in ("signature", "credential")
}
_PARAMETER = re.compile(r"(?P<name>(?<=[?&])[A-Za-z0-9_-]+)=(?P<value>[^&#\s'\"]+)")
_FLAG = re.compile(  # --token VALUE
    r"(?<![A-Za-z0-9_.-])(?P<name>--?[A-Za-z][A-Za-z0-9_.-]*+)(?P<between>\s++)(?P<value>[^-\s'\"][^\s'\"]*+)"
)


def names_secret(name: str) -> bool:
    """Whether a key, a variable or a flag of this name holds a secret, as HF_TOKEN, wandb.api_key and authToken do."""
    last = re.split(r"[/\s]", name)[-1]
    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[A-Z]", last)]
    return bool(_WORDS & set(words) or _PAIRS & set(zip(words, words[1:], strict=False)) or _JOINED & set(words))


def redacted(value: Any) -> Any:
    """The same without credentials: text with each of them as ***; mappings, lists and tuples all the way down.

    A value under a name that is a secret's is *** whatever it is, unless it is empty, a number or a truth value. What
    is no text and holds none stays as it is.
    """
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return {key: _under(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [redacted(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def guard() -> None:
    """From here on this process writes no credential in a traceback or a line of Python's logging.

    What libraries of another language write to stderr by themselves does not pass through here.
    """

    def told(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
        print(redacted("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            told(args.exc_type, args.exc_value, args.exc_traceback)

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        with contextlib.suppress(Exception):  # arguments that don't fit: logging itself says so, and goes on
            record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = redacted("".join(traceback.format_exception(*record.exc_info))).rstrip("\n")
        return record

    before = logging.getLogRecordFactory()
    sys.excepthook, threading.excepthook = told, in_thread
    if before.__module__ != __name__:  # not twice
        logging.setLogRecordFactory(made)


def credentials(settings: Mapping[str, Any]) -> list[str]:
    """The dotted keys of a flat config whose values hold a credential; most often none."""
    return [key for key, value in settings.items() if _under(key, value) != value]


def _under(key: str, value: Any) -> Any:
    if isinstance(value, str | bytes) and value and names_secret(key):
        return BLANK
    return redacted(value)


def _text(text: str) -> str:
    text = _USER.sub(f"{BLANK}@", text)
    text = _PARAMETER.sub(_parameter, text)
    text = _named(_FLAG, _named(_NAMED, text))
    return _VALUE.sub(BLANK, text)


def _parameter(match: re.Match) -> str:
    secret = match["name"].lower() in _QUERY or names_secret(match["name"])
    return f"{match['name']}={BLANK}" if secret else match[0]


def _named(pattern: re.Pattern, text: str) -> str:
    """Blanks out what stands behind names of secrets. The value of another name may hold such a name itself."""
    parts, at = [], 0
    while match := pattern.search(text, at):
        start, value, between = match.start("value"), match["value"], match["between"]
        parts.append(text[at:start])
        at = start
        # What people are told of a setting, as in "token: expected …", is a word and no secret.
        told = (between.isspace() or between.strip() == ":") and re.fullmatch("[a-z]+", value)
        if names_secret(match["name"]) and not value.startswith(BLANK) and not told:
            parts.append(BLANK)
            at = match.end()
    return "".join([*parts, text[at:]])
