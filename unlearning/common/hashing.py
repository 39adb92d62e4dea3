"""Hash JSON content."""

import hashlib
import json
from typing import Any


def hash_json(content: Any) -> str:
    """Return the SHA-256 of content, written as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
