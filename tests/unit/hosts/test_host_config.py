"""flyd.toml: what it says comes back from what flyd writes; labels are validated."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from flyd.errors import InvalidInput
from flyd.hosts.config import HostConfig, config_text, read_config
from flyd.model import Resources

CONFIG = HostConfig(
    name="ams-1",
    region="ams",
    address="127.11.0.1",
    subnet="127.11",
    etcd=("127.11.0.1:2379",),
    data_dir="/var/lib/flyd",
)


def written(folder: Path, text: str) -> Path:
    path = folder / "flyd.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("labels", [{}, {"disk": "nvme"}, {"disk": "nvme", "example.com/rack": "a:7"}])
@pytest.mark.parametrize("capacity", [None, Resources(cpus=2, memory_mb=512, disk_gb=3)])
def test_what_is_written_is_read_again(
    tmp_path: Path, labels: dict[str, str], capacity: Resources | None
) -> None:
    config = msgspec.structs.replace(CONFIG, labels=labels, capacity=capacity)
    assert read_config(written(tmp_path, config_text(config))) == config


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("disk = 3", "Expected `str`, got `int`"),
        ('"a b" = "c"', "'a b' is no label's name"),
        (f'{"n" * 64} = "c"', "is no label's name"),
        ('disk = ""', "'' is no label's value"),
        (f'disk = "{"v" * 129}"', "is no label's value"),
        ("\n".join(f'n{n} = "x"' for n in range(65)), "65 labels are too many: at most 64"),
    ],
)
def test_a_wrong_label_is_refused_with_the_file_named(tmp_path: Path, labels: str, words: str) -> None:
    path = written(tmp_path, config_text(CONFIG) + f"[labels]\n{labels}\n")
    with pytest.raises(InvalidInput, match=r"flyd\.toml") as refusal:
        read_config(path)
    assert words in refusal.value.message
