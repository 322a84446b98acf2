"""The table of verbs."""

import importlib.util

import pytest

from launch import cli


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown and summary in shown for verb, (_, summary) in cli.VERBS.items())


def test_every_verb_names_a_function() -> None:
    for verb in cli.VERBS:
        assert callable(cli.find(verb))


def test_verbs_of_two_words() -> None:
    assert cli.split_verb(["data", "write", "a=1"]) == ("data write", ["a=1"])
    assert cli.split_verb(["submit", "write"]) == ("submit", ["write"])


def test_an_unknown_verb_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sbmit"]) == 2
    assert capsys.readouterr().err == (
        "error: synthos has no verb 'sbmit'; did you mean 'submit'? "
        "allowed: cancel, data audit, data filter, data index, data plan, data preview, data quarantine, data reshard, "
        "data stats, data validate, data write, diff, doctor, explain, gc, generate, logs, ls, requests detailmaster, "
        "resume, retry, status, stop, submit, wandb sync, weights export\n"
    )


def test_faults_of_the_user_are_a_message_and_faults_of_the_code_raise(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "verbs_for_test.py").write_text(
        "def user(arguments):\n    raise ValueError(f'no {arguments[0]}')\n"
        "def disk(arguments):\n    open(__file__ + '/x')\n"
        "def code(arguments):\n    return lambda: int('x')\n"
        "def fine(arguments):\n    return lambda: 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("verbs_for_test")
    for name in ("user", "disk", "code", "fine"):
        monkeypatch.setitem(cli.VERBS, name, (f"verbs_for_test:{name}", ""))
    assert cli.main(["user", "hat"]) == 2
    assert capsys.readouterr().err == "error: no hat\n"
    assert cli.main(["disk"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/verbs_for_test.py/x: Not a directory\n"
    assert cli.main(["fine"]) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["code"])
