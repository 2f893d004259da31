"""Turn speculative-decoding draft models into one standard format that inference engines serve.

Users call `convert_model` or the command ``speculators``. Plugins import everything that they need
from here, torch building blocks from `speculators.modeling`, and tests from `speculators.testing`. Names are
imported when first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speculators import decoder
    from speculators.batch import BatchResult, Job, JobOutcome, read_jobs, run_jobs
    from speculators.checkpoint import Checkpoint
    from speculators.config import DecoderLayerConfig, LayeredConfig, SpeculatorConfig
    from speculators.convert import ConversionResult, convert_model
    from speculators.difference import Difference, diff_models
    from speculators.dry_run import PlannedConversion, plan_conversion
    from speculators.errors import (
        AlgorithmError,
        AlreadyConvertedError,
        CheckpointError,
        ExecutorError,
        MismatchError,
        OptionError,
        OutputError,
        PluginError,
        PublishError,
        SpeculatorsError,
        UnavailableError,
        UploadError,
        ValidationError,
    )
    from speculators.export import ExportResult, export_model
    from speculators.hookspecs import hookimpl
    from speculators.inspection import Inspection, inspect_model
    from speculators.plan import Facts, match
    from speculators.registry import Registry
    from speculators.spec import Alternative, Context, ConverterSpec, Example, Options, Original, StatedAs, Vllm
    from speculators.table import Derive, Drop, Keep, Merge, Refuse, Rename, Row, Shared, Split, Table
    from speculators.validation import validate_model
    from speculators.verifier import Verifier

__version__ = "1.0.0"

_HOMES = {
    "AlgorithmError": "errors",
    "AlreadyConvertedError": "errors",
    "Alternative": "spec",
    "BatchResult": "batch",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "Context": "spec",
    "ConversionResult": "convert",
    "ConverterSpec": "spec",
    "DecoderLayerConfig": "config",
    "Derive": "table",
    "Difference": "difference",
    "Drop": "table",
    "Example": "spec",
    "ExecutorError": "errors",
    "ExportResult": "export",
    "Facts": "plan",
    "Inspection": "inspection",
    "Job": "batch",
    "JobOutcome": "batch",
    "Keep": "table",
    "LayeredConfig": "config",
    "Merge": "table",
    "MismatchError": "errors",
    "OptionError": "errors",
    "Options": "spec",
    "Original": "spec",
    "OutputError": "errors",
    "PlannedConversion": "dry_run",
    "PluginError": "errors",
    "PublishError": "errors",
    "Refuse": "table",
    "Registry": "registry",
    "Rename": "table",
    "Row": "table",
    "Shared": "table",
    "SpeculatorConfig": "config",
    "SpeculatorsError": "errors",
    "Split": "table",
    "StatedAs": "spec",
    "Table": "table",
    "UnavailableError": "errors",
    "UploadError": "errors",
    "ValidationError": "errors",
    "Verifier": "verifier",
    "Vllm": "spec",
    "convert_model": "convert",
    "diff_models": "difference",
    "export_model": "export",
    "hookimpl": "hookspecs",
    "inspect_model": "inspection",
    "match": "plan",
    "plan_conversion": "dry_run",
    "read_jobs": "batch",
    "run_jobs": "batch",
    "validate_model": "validation",
}

__all__ = [
    "AlgorithmError",
    "AlreadyConvertedError",
    "Alternative",
    "BatchResult",
    "Checkpoint",
    "CheckpointError",
    "Context",
    "ConversionResult",
    "ConverterSpec",
    "DecoderLayerConfig",
    "Derive",
    "Difference",
    "Drop",
    "Example",
    "ExecutorError",
    "ExportResult",
    "Facts",
    "Inspection",
    "Job",
    "JobOutcome",
    "Keep",
    "LayeredConfig",
    "Merge",
    "MismatchError",
    "OptionError",
    "Options",
    "Original",
    "OutputError",
    "PlannedConversion",
    "PluginError",
    "PublishError",
    "Refuse",
    "Registry",
    "Rename",
    "Row",
    "Shared",
    "SpeculatorConfig",
    "SpeculatorsError",
    "Split",
    "StatedAs",
    "Table",
    "UnavailableError",
    "UploadError",
    "ValidationError",
    "Verifier",
    "Vllm",
    "__version__",
    "convert_model",
    "decoder",
    "diff_models",
    "export_model",
    "hookimpl",
    "inspect_model",
    "match",
    "plan_conversion",
    "read_jobs",
    "run_jobs",
    "validate_model",
]


def __getattr__(name: str) -> Any:
    if name == "decoder":
        return importlib.import_module("speculators.decoder")
    if name not in _HOMES:
        deprecation = importlib.import_module("speculators.deprecation")
        if replacement := deprecation.NAMES.get(name):
            deprecation.warn(f"speculators.{name}", replacement)
            return __getattr__(replacement.instead.removeprefix("speculators."))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"speculators.{_HOMES[name]}"), name)
