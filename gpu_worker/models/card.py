"""The model card: what the rest of the fleet must know of a model. Loads without torch."""

from __future__ import annotations

from pathlib import Path

from gpu_worker.models.fields import Fields
from gpu_worker.models.files import default_model_name, model_kind
from gpu_worker.models.gguf_config import read_gguf_config
from gpu_worker.models.gguf_file import GGUFFile
from gpu_worker.models.gguf_tokenizer import adds_bos, build_gguf_tokenizer, token_text
from gpu_worker.models.hf_config import read_hf_config
from gpu_worker.models.hf_tokenizer import read_hf_tokenizer
from wire.messages import ModelCard


def load_model_card(
    model_path: Path, *, name: str | None, block_size: int, max_model_len: int | None
) -> ModelCard:
    """The card of the model at `model_path`: a Hugging Face directory or a .gguf file.

    `name` None takes the directory's or the file's name. `max_model_len` shortens the context.
    The card's tokenizer adds no special tokens, whatever is asked of it: `add_bos_token` says
    whether to put `bos_token_id` before a plain prompt (chat templates write it themselves).
    Raises ModelError.
    """
    name = name or default_model_name(model_path)
    if model_kind(model_path) == "gguf":
        return _gguf_card(model_path, name, block_size, max_model_len)
    return _hf_card(model_path, name, block_size, max_model_len)


def _gguf_card(path: Path, name: str, block_size: int, max_model_len: int | None) -> ModelCard:
    file = GGUFFile(path)
    config = read_gguf_config(file, max_model_len)
    bos_token_id, bos_token = token_text(file, "bos_token_id")
    _, eos_token = token_text(file, "eos_token_id")
    metadata = Fields(file.metadata, str(path))
    has_template = metadata.has("tokenizer.chat_template")
    return ModelCard(
        name=name,
        tokenizer_json=build_gguf_tokenizer(file).to_str().encode(),
        chat_template=metadata.text("tokenizer.chat_template") if has_template else None,
        bos_token=bos_token,
        eos_token=eos_token,
        bos_token_id=bos_token_id,
        add_bos_token=bos_token_id is not None and adds_bos(file),
        vocab_size=config.vocab_size,
        max_model_len=config.max_model_len,
        block_size=block_size,
    )


def _hf_card(path: Path, name: str, block_size: int, max_model_len: int | None) -> ModelCard:
    config = read_hf_config(path, max_model_len)
    parts = read_hf_tokenizer(path)
    bos_token_id = None
    if parts.bos_token is not None:
        bos_token_id = parts.tokenizer.token_to_id(parts.bos_token)
    return ModelCard(
        name=name,
        tokenizer_json=parts.tokenizer.to_str().encode(),
        chat_template=parts.chat_template,
        bos_token=parts.bos_token,
        eos_token=parts.eos_token,
        bos_token_id=bos_token_id,
        add_bos_token=parts.adds_bos,
        vocab_size=config.vocab_size,
        max_model_len=config.max_model_len,
        block_size=block_size,
    )
