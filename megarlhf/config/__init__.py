"""Settings: frozen pydantic models beside what they configure, one YAML file per run, dotted overrides."""

from megarlhf.config.base import Config
from megarlhf.config.describe import FieldHelp, describe, describe_groups
from megarlhf.config.load import dump_config, load_config

__all__ = ["Config", "FieldHelp", "describe", "describe_groups", "dump_config", "load_config"]
