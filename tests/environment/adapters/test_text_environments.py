"""Adapters to SkyRL-gym, reasoning-gym and TRL's environment objects, on the real packages."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.common.errors import ConfigError
from atpo_fast.environment.adapters import reasoning_gym, skyrl_gym, trl
from tests.helpers.adapter_sessions import caller
from tests.helpers.small_tokenizers import byte_level


def test_skyrl_gym() -> None:
    """Fails if the prompt is told twice, rewards of turns are lost, or a copy counts its sibling's turns."""
    pytest.importorskip("skyrl_gym", reason="skyrl-gym is not installed")
    task = {"id": "1", "question": "1 + 1?", "env_class": "gsm8k_multi_turn", "max_turns": 2}
    with pytest.raises(AssertionError, match="ground_truth"):
        skyrl_gym.open_session(task, 0)
    session = skyrl_gym.open_session({**task, "reward_spec": {"ground_truth": "2"}}, 0)
    assert session.opening is None
    first = session.step("#### 3")
    assert first.text.startswith("Now provide only the final numeric answer") and first.reward == pytest.approx(0.1)
    twin = copy.deepcopy(session)
    assert (session.step("no answer").reward, session.env.turns, twin.env.turns) == (0.0, 2, 1)
    last = twin.step("#### 2")
    assert (last.reward, last.done) == (1.0, True)


def test_reasoning_gym() -> None:
    """Fails if the seed does not choose the problem, or tags around the answer count as part of it."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    task = {"id": "1", "dataset": "chain_sum", "dataset_options": {"max_terms": 2}}
    session, same, other = (reasoning_gym.open_session(task, seed) for seed in (7, 7, 2**40 + 8))
    assert session.opening == same.opening != other.opening
    answer = session._problem["answer"]
    twin = session.fork()
    assert [twin.step(text).reward for text in (f"so <answer>{answer}</answer>", answer, "many")] == [1, 1, 0]


class Shop:
    """An environment object of TRL: docstrings and types describe its tools."""

    def reset(self, money: int, **row: Any) -> str:
        self.money, self.bought = money, []  # type: ignore[var-annotated]
        return f"You have {money} coins."

    def buy(self, thing: str, price: int) -> str:
        """
        Buy a thing.

        Args:
            thing: what to buy
            price: how many coins
        """
        if price > self.money:
            raise ValueError("too expensive")
        self.money -= price
        self.bought.append(thing)
        return f"{self.money} coins left"

    async def look(self) -> list[str]:
        """
        List what was bought.
        """
        await asyncio.sleep(0)
        return self.bought

    @property
    def costly(self) -> str:
        raise RuntimeError("nobody asked for this property")

    async def get_reward(self) -> float:
        return len(self.bought) / 2


def test_trl_environment_object() -> None:
    """Fails if reset's text, an async tool or an async reward is lost, or `reset` becomes a tool of the policy."""
    with caller() as call:
        session = trl.sessions_of(Shop)({"id": "1", "money": 5}, 0)
        assert session.opening == "You have 5 coins."
        assert [tool["function"]["name"] for tool in session.tools] == ["buy", "look"]
        assert session.tools[0]["function"]["parameters"]["required"] == ["thing", "price"]
        assert call.calls(session, ("buy", {"thing": "key", "price": 2}))[0].text == "3 coins left"
        twin = copy.deepcopy(session)
        with pytest.raises(ValueError, match="too expensive"):
            twin.call("buy", {"thing": "house", "price": 9})
        call.calls(twin, ("buy", {"thing": "lamp", "price": 1}))
        assert [call(one.score([])) for one in (session, twin)] == [0.5, 1.0]
        assert call.calls(twin, ("look", {}))[0].text == "['key', 'lamp']"


def test_trl_takes_the_same_methods_for_tools(tmp_path: Path) -> None:
    """Fails if TRL's trainer offers other methods of an object than the adapter does."""
    package = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_level()
    tokenizer.pad_token = "<eos>"
    template = Path(package.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text()  # TRL wants one that writes tools
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=1, **sizes)
    )
    trainer = package.GRPOTrainer(
        model,
        args=package.GRPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Shop."}], "money": 3}] * 8),
        processing_class=tokenizer,
        environment_factory=Shop,
    )
    names = [tool.__name__ for tool in trainer.tools]
    assert names == [method.__name__ for method in trl.tool_methods(Shop())] == ["buy", "look"]


@pytest.mark.parametrize(("adapter", "task"), [(skyrl_gym, {"id": "q7"}), (reasoning_gym, {"id": "q7"})])
def test_what_is_missing_is_named(adapter: Any, task: dict[str, Any]) -> None:
    """Fails if a user sees a bare KeyError or ModuleNotFoundError."""
    with pytest.raises(ConfigError, match=r"question 'q7': its record has no column|pip install (skyrl|reasoning)-gym"):
        adapter.open_session(task, 0)
