"""How remote places are reached: with which token, through which cache, or not at all."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from speculators.errors import CheckpointError
from speculators.progress import Progress, unheard


@dataclass(frozen=True)
class Access:
    """How remote places are reached.

    Args:
        token: Token for the Hub; that of ``HF_TOKEN`` or of a login by default.
        cache_dir: Where downloads are kept; huggingface_hub's cache by default (``HF_HOME``, ``HF_HUB_CACHE``).
        offline: Whether nothing but that cache may be used; it may not in any case where ``HF_HUB_OFFLINE`` says so.
        progress: Told about the bytes that were downloaded.
    """

    token: str | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    offline: bool = False
    progress: Progress = unheard

    @property
    def hub_token(self) -> str | bool:
        """The token for the Hub; ``False`` if there is none.

        Raises:
            CheckpointError: It holds characters that no token has.
        """
        from huggingface_hub import get_token

        token = (self.token or get_token() or "").strip()
        if not re.fullmatch(r"[!-~]*", token):
            raise CheckpointError("the token for the Hub holds characters that no token has; copy it again")
        return token or False

    @property
    def is_offline(self) -> bool:
        """Whether nothing may be fetched."""
        from huggingface_hub import constants

        said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
        return self.offline or constants.HF_HUB_OFFLINE or said.upper() in constants.ENV_VARS_TRUE_VALUES

    @property
    def hub_cache(self) -> Path:
        """The folder in which huggingface_hub keeps whole files."""
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()

    @property
    def own_cache(self) -> Path:
        """The folder for what huggingface_hub has no place for: parts of files, and files of other servers."""
        from huggingface_hub import constants

        if self.cache_dir:
            return self.hub_cache / ".speculators"
        return Path(constants.HF_ASSETS_CACHE).expanduser().absolute() / "speculators"
