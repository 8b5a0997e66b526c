"""Where the model that comes with the package lies: a Hugging Face folder, read like any other (docs/embedded_model.md)."""

from pathlib import Path

EMBEDDED_MODEL_NAME = "pydoc-llama"


def embedded_model_path() -> Path:
    """The folder with config.json, model.safetensors and tokenizer.json. Raises FileNotFoundError where the installation lacks it.

    Found beside this file: `importlib.resources` cannot read a package without `__init__.py` from an editable install.
    """
    folder = Path(__file__).parent / EMBEDDED_MODEL_NAME
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the embedded model is missing: no config.json in {folder}; docs/embedded_model.md tells how to train it")
    return folder
