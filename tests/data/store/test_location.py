"""Which addresses may be named, how they are taken apart, and what is never shown of them."""

import pytest

from synthos.data.store.location import check_location, file_name, is_remote, join, masked, parent


@pytest.mark.parametrize(
    "url",
    [
        "shards/00000.tar", "/data/a b/{0..3}.tar", "file:///data/x.tar", "http://host/x.tar?part=1", "https://host/x.tar",
        "s3://bucket/x.tar", "gs://bucket/x.tar", "hf://datasets/me/set@main/x.tar", "http://[::1]:8000/x.tar",
        "data:v2/x.tar",
    ],
)  # fmt: skip
def test_what_can_be_read_is_let_through(url: str) -> None:
    check_location(url, "data.shards")


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("pipe:cat x.tar", "shell"), ("PIPE:rm -rf /", "shell"), ("s3://b/x.tar::s3://b/y.tar", "chains"),
        ("simplecache::s3://b/x.tar", "chains"), ("ftp://host/x.tar", "unknown scheme 'ftp'"),
        ("memory://x.tar", "unknown scheme"), ("file:/etc/passwd", "unknown scheme"), ("local:x", "unknown scheme"),
        ("S3://b/x", "unknown scheme 'S3'"),
    ],
)  # fmt: skip
def test_what_is_never_read_is_refused(url: str, fault: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.shards: '.*{fault}.*allowed are plain paths, file://, http://"):
        check_location(url, "data.shards")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd", "local:/etc/passwd"])
def test_a_list_can_name_no_file_of_this_machine_by_scheme(url: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.shards: .*begin with 'file:'; allowed are relative paths, http://"):
        check_location(url, "data.shards", listed=True)
    check_location("http://host/x.tar", "data.shards", listed=True)
    check_location("00000.tar", "data.shards", listed=True)


def test_the_message_of_a_refusal_is_masked() -> None:
    with pytest.raises(ValueError) as refused:
        check_location("ftp://me:plantedpassword@host/x?token=plantedtoken", "data.shards")
    assert "planted" not in str(refused.value) and "ftp://***@host/x?token=***" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@w0rd@host/x.tar", "https://***@host/x.tar"),
        ("https://host/x?X-Amz-Credential=k%2F1&X-Amz-Date=1&X-Amz-Signature=abc", None),
        ("https://host/x?sv=1&sig=a%2Bb&se=2", "https://host/x?sv=1&sig=***&se=2"),
        ("https://host/x?a=1&access_token=abc", "https://host/x?a=1&access_token=***"),
        ("https://host/x?AWSAccessKeyId=k&Signature=s", "https://host/x?AWSAccessKeyId=***&Signature=***"),
        ("503, url='https://host/x?token=abc', again", "503, url='https://host/x?token=***', again"),
        ("{'Authorization': 'Bearer abc', 'a': 'b'}", "{'Authorization': '***', 'a': 'b'}"),
        ("x-amz-security-token:abc/+=\nhost:x", "x-amz-security-token:***\nhost:x"),
        ("{'aws_secret_access_key': b'abc'}", "{'aws_secret_access_key': b'***'}"),
        ("of hf_abcdefghijkl", "of hf_***"),
        ("hf://datasets/me/set@main/x.tar", "hf://datasets/me/set@main/x.tar"),
        ("s3://bucket/tokens/design=1/x.tar", "s3://bucket/tokens/design=1/x.tar"),
        ("/data/signature/x.tar", "/data/signature/x.tar"),
    ],
)
def test_secrets_are_masked_and_the_rest_is_not(text: str, shown: str | None) -> None:
    shown = shown or "https://host/x?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Signature=***"
    assert masked(text) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    ("folder", "name", "whole"),
    [
        ("/data/x", "0.tar", "/data/x/0.tar"),
        ("data", "0.tar", "data/0.tar"),
        ("s3://bucket", "0.tar", "s3://bucket/0.tar"),
        ("s3://bucket/a", "0.tar", "s3://bucket/a/0.tar"),
        ("https://host", "0.tar", "https://host/0.tar"),
        ("https://host/a?sig=1/2", "0.tar", "https://host/a/0.tar?sig=1/2"),
        ("s3://bucket/a?b", "0?.tar", "s3://bucket/a?b/0?.tar"),
        ("hf://datasets/me/set@main", "0.tar", "hf://datasets/me/set@main/0.tar"),
    ],
)
def test_folder_and_name_make_a_file_and_come_back(folder: str, name: str, whole: str) -> None:
    assert join(folder, name) == whole
    assert (parent(whole), file_name(whole)) == (folder, name)


def test_only_what_has_a_scheme_is_remote() -> None:
    remote = ["http://h/x", "https://h/x", "s3://b/x", "gs://b/x", "hf://d/x"]
    local = ["x.tar", "/x.tar", "file:///x.tar", "FILE:///x.tar", "a:b", "../x?y"]
    assert [url for url in remote + local if is_remote(url)] == remote
    assert parent("x.tar") == "." and join("s3://b/a/", "x") == "s3://b/a/x"


@pytest.mark.parametrize("url", ["https://user:word@host/0.tar", "s3://bucket/0.tar?X-Amz-Signature=abc123"])
def test_a_config_holds_no_secret(url: str) -> None:
    with pytest.raises(ValueError, match=r"data\.shards: '[^']*\*\*\*.*: it holds a secret, and a config is kept"):
        check_location(url, "data.shards")
    check_location(url, "data.shards", listed=True)
