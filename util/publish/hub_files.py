"""What the hub gets of a run: the files of its model without paths and names of this machine, and a model card."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path, PurePath

from util.config import Config
from util.publish.settings import HubSettings, TrackerSettings
from util.run_folder import METRICS, SETTINGS, final_in_words, read_final, read_metrics, read_settings

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
PUBLISHED = (*WEIGHTS, "adapter_model.safetensors", "adapter_config.json", "config.json", "generation_config.json",
             "tokenizer*.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
             "*processor_config.json", "chat_template.*", SETTINGS, METRICS, "loss.png")  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.json")  # a "/" in them is a token, not a path
PERSONAL = ("launched_by", "cache_dir", "resume", "output_dir")  # settings that say who trained where
CARD = Path(__file__).with_name("model_card.jinja")


# ---- files ---------------------------------------------------------------------------------------------------------


def stage(run: Path, model: Path, step: int | None, repository: str, folder: Path) -> None:
    """Fill an empty folder with what `repository` gets. Files that go as they are become links, so none is copied.

    `run`: the run directory, for settings and metrics. `model`: the folder of the model, often the same. `step`: the
    last step whose metrics belong to this model; None: all do.
    """
    from huggingface_hub.utils import filter_repo_objects

    files = [path.name for path in model.iterdir() if path.is_file()]
    names = list(filter_repo_objects(sorted(files), allow_patterns=list(PUBLISHED)))
    for name in names:
        public = None
        if name.endswith(".json") and name not in VOCABULARIES:
            public = public_text(model / name)
        if public is None:
            (folder / name).symlink_to((model / name).resolve())
        else:
            (folder / name).write_text(public, encoding="utf-8")
    lines = read_metrics(run)
    if step is not None and lines:
        lines = [line for line in lines if line["step"] <= step]
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    final = read_final(run) if step is None else None
    of_step = final_in_words(final) if final else ""
    card = model_card(read_settings(run), lines, family_tag(model), "adapter_config.json" in names, repository, of_step)
    (folder / "README.md").write_text(card, encoding="utf-8")


def family_tag(model: Path) -> str:
    """`qwen2_vl`: the family of a model or adapter, by the processor beside it; "" where that is not known."""
    from util.family import model_type_of_processor

    try:
        saved = json.loads((model / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return model_type_of_processor(saved.get("processor_class", ""))


def public_text(path: Path) -> str | None:
    """The text of a JSON file without paths and names of this machine; None where it has none of them."""
    own = json.loads(path.read_text(encoding="utf-8"))
    public = publishable(own)
    return None if public == own else json.dumps(public, indent=2, ensure_ascii=False) + "\n"


def publishable(value, key: str = ""):
    """A JSON value without what says where it was made: of a path on this machine only the last name is left."""
    if isinstance(value, dict):
        return {name: publishable(inner, name) for name, inner in value.items() if name not in PERSONAL}
    if isinstance(value, list):
        return [publishable(inner, key) for inner in value]
    if not isinstance(value, str) or not value or "\n" in value:
        return value
    if key in ("model", "base_model_name_or_path") and (name := name_on_hub(value)):
        return name
    looks_like_a_path = re.match(r"/\w|~|\.\.?/|[A-Za-z]:\\|file:/", value)
    if key in ("data", "eval_data") or looks_like_a_path or os.path.isdir(value):
        return PurePath(value.replace("\\", "/")).name
    return value


def name_on_hub(model: str) -> str | None:
    """OWNER/NAME of a model, also of one that lies in the hub's cache here; None for any other folder."""
    if cached := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", model):
        return "/".join(cached.groups())
    return model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists() else None


# ---- the model card -------------------------------------------------------------------------------------------------


def model_card(
    settings: dict, lines: list[dict], family: str, is_adapter: bool, repository: str, of_step: str = ""
) -> str:
    """README.md of a pushed model: model_card.jinja, filled in.

    `settings`: training_config.json. `lines`: metrics.jsonl. `family`: its tag, or "". `repository`: OWNER/NAME, from
    which the model is loaded. `of_step`: of which step the model is, in words.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = name_on_hub(settings["model"])
    relation = "adapter" if is_adapter else "finetune"
    about = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[*filter(None, [family]), "lora" if is_adapter else "fine-tuned"],
    )
    steps = [line for line in lines if line.get("loss") is not None]
    chosen = chosen_settings(settings)
    card = ModelCard.from_template(
        about,
        template_path=str(CARD),
        base_name=base or PurePath(settings["model"]).name,
        is_adapter=is_adapter,
        repository=repository,
        not_trained=", ".join(settings.get("freeze", [])),
        steps=f"{steps[-1]['step']:,}" if steps else "",
        of_step=of_step,
        samples=f"{sum(line['samples'] for line in steps):,}",
        dtype=settings["dtype"],
        data=table(["file", "size", "used for"], data_rows(settings)),
        scores=scores(steps, lines),
        settings=table(["setting", "value"], [[key, f"`{shown(value)}`"] for key, value in chosen.items()]),
        command=" ".join(["python finetune.py", *(flag(key, value) for key, value in chosen.items())]),
        versions=table(["package", "version"], list(settings.get("versions", {}).items())),
    )
    return f"{card}\n"


def table(head: list[str], rows: list) -> str:
    """A table in Markdown, or that there is nothing to show."""
    if not rows:
        return "None."
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def data_rows(settings: dict) -> list[list[str]]:
    """Name, size and use of each data file, without the folder it lies in."""
    rows = []
    for use, key in (("training", "data"), ("evaluation", "eval_data")):
        for file in settings.get(key, []):
            path = Path(re.sub(r"\*[\d.]+$", "", file))  # FILE*2: twice
            size = f"{path.stat().st_size:,} bytes" if path.is_file() else "-"
            rows.append([f"`{publishable(file, key)}`", size, use])
    return rows


def scores(steps: list[dict], lines: list[dict]) -> str:
    """The last training loss, and the scores of two evaluations: that with the lowest loss, and the last one.

    `steps`: those of `lines`, which are of metrics.jsonl, that training steps wrote.
    """
    text = []
    if steps:
        text.append(f"Loss of the last training step, per supervised token: {shown(steps[-1]['loss'])}.")
    evaluated = [line for line in lines if line.get("eval_loss") is not None]
    if evaluated:
        last = evaluated[-1]
        best = min(evaluated, key=lambda line: line["eval_loss"])
        head, columns = [f"step {best['step']} (lowest loss)"], [best]
        if best["step"] != last["step"]:
            head.append(f"step {last['step']}")
            columns.append(last)
        rows = []
        for key in last:
            if key.startswith("eval_"):
                name = key.removeprefix("eval_").replace("_", " ")
                rows.append([name, *(shown(line.get(key)) for line in columns)])
        text.append("On held-out data:")
        text.append(table(["", *head], rows))
    return "\n\n".join(text) or "None."


def chosen_settings(settings: dict) -> dict:
    """The settings that are not the defaults, fit to be published, but for those of trackers and of the hub."""
    left_out = {*PERSONAL, *(item.name for item in [*fields(TrackerSettings), *fields(HubSettings)])}
    chosen = {}
    # The default of the learning rate depends on the rank: the command on the card must say what was trained with.
    defaults = {**vars(Config()), "learning_rate": Config(lora_rank=settings.get("lora_rank", 0)).learning_rate}
    for name, default in defaults.items():
        if name not in left_out and settings.get(name, default) != default:
            chosen[name] = publishable(settings[name], name)
    return chosen


def shown(value) -> str:
    """A value as the card shows it: items of a list side by side, 4 digits of a number."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flag(key: str, value) -> str:
    """A setting as it is given on the command line."""
    if isinstance(value, bool):
        return f"--{key}" if value else f"--no-{key}"
    return f"--{key} {value if isinstance(value, float) else shown(value)}"
