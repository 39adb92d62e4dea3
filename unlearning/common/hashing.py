"""Hash JSON content."""

import hashlib
import json
from typing import Any


def hash_json(content: Any) -> str:
    """SHA-256 of JSON."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
