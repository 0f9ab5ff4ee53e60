"""What a server writes to its log: a line of JSON for each call, and for whatever else there is to say."""

import json
import logging
import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TextIO

from lamella_engine.service.server import Answered
from lamella_engine.service.tokens import PREFIX

_calls = logging.getLogger("lamella.calls")

# What looks like a token, wherever a caller has put it: a repository's name, for one.
_TOKEN = re.compile(rf"{PREFIX}[0-9a-zA-Z]+")

# A caller's words are kept to this length, of which a name has at most a quarter.
_LONGEST = 1000


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line, in ASCII."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = {"time": time, "level": record.levelname.lower()}
        answered = getattr(record, "answered", None)
        if isinstance(answered, Answered):
            fields |= {
                name: value[:_LONGEST] if isinstance(value, str) else value for name, value in asdict(answered).items()
            }
            fields["seconds"] = round(answered.seconds, 6)
        else:
            fields |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return _TOKEN.sub(f"{PREFIX}...", json.dumps(fields))


def log_to(stream: TextIO) -> None:
    """Have everything of lamella logged to ``stream``, a line of JSON each, from INFO on."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines())
    logger = logging.getLogger("lamella")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_call(answered: Answered) -> None:
    """Log a call that has ended."""
    _calls.info("call", extra={"answered": answered})
