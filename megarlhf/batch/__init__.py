"""The stages of the pipeline as types: frozen, their axes checked, no optional fields."""
