"""Where ChartQA's rows come from: the hub, or a folder in the published layout. The rows are not checked here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from util.command_line import UserError
from util.data.lines import DataError, open_entries, shortened

HUB_NAME = "HuggingFaceM4/ChartQA"
KINDS = ("human", "augmented")  # who wrote a question; on the hub 0 and 1 of the column human_or_machine
ROWS = 64  # of the hub's table read at a time; each holds an image


@dataclass
class Row:
    """One question as its source holds it, unchecked."""

    where: str
    kind: str
    query: object
    label: object
    image: object  # a file name in the split's png/, or an image's bytes


class Folder:
    """The published layout: {split}/png/, {split}/{split}_human.json and {split}/{split}_augmented.json."""

    def __init__(self, folder: str) -> None:
        nested = Path(folder, "ChartQA Dataset")  # as the repository and the archive have it
        self.root = nested if nested.is_dir() else Path(folder)
        if not self.root.is_dir():
            raise UserError(f"--from {folder}: no such folder; give hub, drawn, or the folder that holds train/")

    def file(self, split: str, kind: str) -> Path:
        return self.root / split / f"{split}_{kind}.json"

    def kinds(self, split: str) -> list[str]:
        """The kind of every row of a split."""
        there = {kind: self.file(split, kind) for kind in KINDS if self.file(split, kind).is_file()}
        if not there:
            wanted = " and ".join(str(self.file(split, kind)) for kind in KINDS)
            raise UserError(f"{wanted}: no such files; name the folder that holds {split}/, or set --splits")
        self.entries = []
        for kind, file in there.items():
            self.entries += [(kind, number, entry) for number, entry in enumerate(open_entries(str(file)))]
        return [kind for kind, _, _ in self.entries]

    def rows(self, split: str, chosen: list[int]) -> Iterator[Row | DataError]:
        """The chosen rows of the split that `kinds` was called for last."""
        for index in chosen:
            kind, number, entry = self.entries[index]
            where = f"{self.file(split, kind)}, row {number}"
            if not isinstance(entry, dict):
                yield DataError(f"{where}: must be an object, is {type(entry).__name__}; repair it")
            elif missing := [key for key in ("imgname", "query", "label") if entry.get(key) is None]:
                yield DataError(f"{where}: has no {missing[0]!r}; add it, or take the row out")
            else:
                yield Row(where, kind, entry["query"], entry["label"], entry["imgname"])


class Hub:
    """The data set of the hub, or a folder with its parquet files, through `datasets`; images stay encoded."""

    def __init__(self, name: str) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError("--from hub needs the package datasets: pip install datasets") from None
        self.name = name
        self.datasets = datasets

    def kinds(self, split: str) -> list[str]:
        """The kind of every row of a split, which is downloaded if it is not there yet."""
        try:
            table = self.datasets.load_dataset(self.name, split=split)
        except Exception as error:  # `datasets` has many: of the hub, the network, the disk, the files
            told = str(error).strip() or type(error).__name__
            told = shortened(told.splitlines()[0], 300)
            raise UserError(
                f"{self.name}, split {split}: cannot be loaded ({told}); the same command goes on with what is "
                "downloaded, and --from FOLDER reads a copy"
            ) from None
        wanted = {"image", "query", "label", "human_or_machine"}
        if missing := wanted - set(table.column_names):
            raise UserError(f"{self.name}, split {split}: has no column {', '.join(sorted(missing))}; is it ChartQA?")
        self.table = table.cast_column("image", self.datasets.Image(decode=False)).with_format("arrow")
        codes = self.table.select_columns(["human_or_machine"])[:]["human_or_machine"].to_pylist()
        if strange := set(codes) - {0, 1}:
            told = f"human_or_machine must be 0 (human) or 1 (machine), is {min(map(str, strange))}"
            raise UserError(f"{self.name}, split {split}: {told}; is it ChartQA?")
        return [KINDS[code] for code in codes]

    def rows(self, split: str, chosen: list[int]) -> Iterator[Row | DataError]:
        """The chosen rows of the split that `kinds` was called for last."""
        numbers = iter(chosen)
        for batch in self.table.select(chosen).iter(ROWS):
            for entry in batch.to_pylist():
                where = f"{self.name}, {split}, row {next(numbers)}"
                image = entry["image"] or {}
                if image.get("bytes") is None:
                    yield DataError(f"{where}: has no image; take it out with --skip_bad")
                else:
                    kind = KINDS[entry["human_or_machine"]]
                    yield Row(where, kind, entry["query"], entry["label"], image["bytes"])
