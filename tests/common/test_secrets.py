"""Secrets stay out of what is saved and printed."""

from __future__ import annotations

import logging

import pytest

from atpo_fast.common.errors import ConfigError, in_words
from atpo_fast.common.log import set_up_logging
from atpo_fast.common.secrets import filled_in, is_written_out, may_be_secret, names_user, redacted, shown
from atpo_fast.config import load_config
from atpo_fast.config.load import dump_config

ENVIRONMENT = {"MY_TOKEN": "s3cr3t-value", "HOME": "/home/someone", "A_KEY": "short"}


@pytest.mark.parametrize(
    ("text", "shown_text"),
    [
        ("http://me:pw@host:80/x", "http://***@host:80/x"),
        ("https://token@host", "https://***@host"),
        ("mail me@host", "mail me@host"),
        ("Authorization: Bearer abcdef123.x-y", "Authorization: Bearer ***"),
        ("Bearer ${MY_TOKEN}", "Bearer ${MY_TOKEN}"),  # a reference is no secret
        ("bearer of news", "bearer of news"),
        ("key s3cr3t-value in /home/someone, short", "key *** in /home/someone, short"),
    ],
)
def test_texts_without_secrets(text: str, shown_text: str) -> None:
    """Fails if a secret is left in a text, or anything else is taken out of it."""
    assert redacted(text, ENVIRONMENT) == shown_text


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("Authorization", "X-Api-Key", "WANDB_API_KEY", "HF_TOKEN", "password", "tokens")),
        *((name, False) for name in ("KEYBOARD", "MONKEY", "tokenizer", "max_tokens_of", "PATH", "author")),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    """Fails if a name is taken for a secret's that is none, or the other way round."""
    assert may_be_secret(name) is secret
    assert is_written_out(name, "value") is secret and not is_written_out(name, "Bearer ${NAME}")
    assert shown({name: ["x"], "other": "x"}) == {name: "***" if secret else ["x"], "other": "x"}


def test_references_are_filled_in() -> None:
    """Fails if `${NAME}` is not replaced, or a missing variable becomes an empty secret."""
    assert filled_in("Bearer ${MY_TOKEN}!", ENVIRONMENT) == "Bearer s3cr3t-value!"
    with pytest.raises(ValueError, match="environment variable NONE is not set"):
        filled_in("${NONE}", ENVIRONMENT)
    assert names_user("http://a:b@c") and not names_user("http://c/@d")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tools.mcp=[{url: 'http://h', headers: {Authorization: hunter2}}]", r"headers\.Authorization .* is a secret"),
        ("tools.mcp=[{command: [x], env: {API_TOKEN: hunter2}}]", r"env\.API_TOKEN .* is a secret"),
        ("tools.mcp=[{url: 'http://me:hunter2@h'}]", "names a user or a password"),
        ("tools.search_url=http://me:hunter2@h/retrieve", r"use tools\.search_token_variable"),
    ],
)
def test_written_secrets_are_refused(override: str, words: str) -> None:
    """Fails if a configuration with a secret in it is accepted, which a run would save, or if the refusal prints it."""
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(None, [override])
    assert "hunter2" not in str(caught.value)


def test_references_are_saved_as_such() -> None:
    """Fails if the saved configuration holds the value of a variable."""
    config = load_config(None, ["tools.mcp=[{url: 'http://h', headers: {Authorization: 'Bearer ${MY_TOKEN}'}}]"])
    assert "Bearer ${MY_TOKEN}" in dump_config(config)


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a warning or an error prints the value of a variable that is a secret."""
    monkeypatch.setenv("SOME_API_KEY", "hunter2-hunter2")
    set_up_logging()
    logging.getLogger("atpo_fast.test").warning("sent %s", "hunter2-hunter2")
    assert capsys.readouterr().err == "warning: sent ***\n"
    assert in_words(ConfigError("hunter2-hunter2 is wrong")) == "*** is wrong"
