from __future__ import annotations

import pytest
from edgedaq.errors import ConfigError
from edgedaq.store_config import (
    DAQJobStoreConfig,
    DAQJobStoreConfigCSV,
    DAQJobStoreConfigMySQL,
    DAQJobStoreConfigRaw,
    DAQJobStoreConfigRedis,
    check_file_path,
)
from hypothesis import given
from hypothesis import strategies as st


def test_it_can_be_made_in_code_and_routes_to_each_store_it_names():
    config = DAQJobStoreConfig(
        csv=DAQJobStoreConfigCSV(file_path="a.csv"), raw=DAQJobStoreConfigRaw("b.bin", length_prefix=True)
    )
    assert config.topics() == ("store.DAQJobStoreCSV", "store.DAQJobStoreRaw")
    file = {"add_date": False, "rotate_size": None, "rotate_every": None, "overwrite": False}
    assert config.to_map() == {
        "csv": {"file_path": "a.csv", **file, "use_zstd": False},
        "raw": {"file_path": "b.bin", **file, "length_prefix": True},
    }


def test_the_plain_map_gives_the_same_configuration_back():
    config = DAQJobStoreConfig(
        mysql=DAQJobStoreConfigMySQL("t"), redis=DAQJobStoreConfigRedis("k", key_expiration_days=3)
    )
    assert DAQJobStoreConfig.from_map(config.to_map()) == config
    assert hash(DAQJobStoreConfig.from_map(config.to_map())) == hash(config)


def test_a_configuration_that_names_no_store_is_refused_because_its_data_would_go_nowhere():
    with pytest.raises(ConfigError, match="at least one store must be named"):
        DAQJobStoreConfig()
    with pytest.raises(ConfigError, match=r"a\.toml: at least one store must be named"):
        DAQJobStoreConfig.from_map({}, "a.toml")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"compression_type": "RAR"}, "RAR"),
        ({"compression_type": "lz4"}, "lz4"),
        ({"compression_level": 13}, "compression_level of LZ4 must be 0 to 12, got 13"),
        ({"compression_type": "ZLIB", "compression_level": 10}, "ZLIB must be 0 to 9, got 10"),
        ({"compression_level": -1}, "-1"),
        ({"rotate_size": "1 kB"}, "rotate_size"),
    ],
)
def test_options_that_no_root_file_can_have_are_refused_on_either_side(options, told):
    with pytest.raises(ConfigError, match=f"a.toml.*{told}"):
        DAQJobStoreConfig.from_map({"root": {"file_path": "x.root", **options}}, "a.toml")


@pytest.mark.parametrize("name", ["", "/", "a/../b", "a//b", ".", "nul\0"])
def test_a_dataset_name_that_names_none_is_refused_on_either_side(name):
    with pytest.raises(ConfigError, match=r"a\.toml.*dataset_name must be like"):
        DAQJobStoreConfig.from_map({"hdf5": {"file_path": "x.h5", "dataset_name": name}}, "a.toml")


@pytest.mark.parametrize(
    "path",
    [
        "", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./x", "a//b", "a/", "x\0y", "a\nb", "a\\b",
        ".hidden", ".state/journal", "_marks.csv", "sub/_marks.csv", "x" * 201, "/".join(["y" * 100] * 6),
    ],
)  # fmt: skip
def test_a_path_that_leaves_its_directory_or_cannot_be_a_file_is_refused_also_in_code(path):
    with pytest.raises(ConfigError, match="file_path must"):
        check_file_path(path)
    with pytest.raises(ConfigError, match="file_path must"):
        DAQJobStoreConfigCSV(file_path=path)


@pytest.mark.parametrize("path", ["a.csv", "sub/dir/a.csv", "Myonen – Größe.csv", "a..b", "a b"])
def test_ordinary_paths_are_taken(path):
    assert check_file_path(path) == path


@given(st.text(max_size=30))
def test_no_accepted_path_leaves_the_directory_it_is_joined_to(path):
    import posixpath

    try:
        check_file_path(path)
    except ConfigError:
        return
    joined = posixpath.normpath(posixpath.join("/out/node", path))
    assert joined.startswith("/out/node/")
