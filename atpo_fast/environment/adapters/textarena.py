"""Games of TextArena (`pip install textarena`) for one player; a session is copied or replayed.

Columns of a question's record: `env_id` as for `textarena.make`, and `env_options`, its further arguments (optional).
"""

from __future__ import annotations

from typing import Any

from atpo_fast.environment.adapters.common import column, package, small_seed
from atpo_fast.environment.session import Result, Session


class TextArenaSession(Session):
    """A session over a game that was made but not reset.

    TextArena's default wrappers repeat the whole game in every observation. Here the policy reads what is new, since
    the rest stands in its context already.
    """

    def __init__(self, env: Any, seed: int):
        self.env = env
        env.reset(num_players=1, seed=small_seed(seed))
        self.opening = self._news()

    def step(self, text: str) -> Result:
        """Make a move. The reward comes with the end of the game."""
        done, _ = self.env.step(text)
        rewards, _ = self.env.close() if done else ({}, None)
        reward = (rewards or {}).get(0)
        return Result(self._news(), None if reward is None else float(reward), bool(done))

    def _news(self) -> str:
        """Take the messages that the player has not seen; its own moves are left out."""
        messages = self.env.state.get_current_player_observation()
        return "\n".join(text for _, text, kind in messages if kind.name != "PLAYER_ACTION")


def open_session(task: dict[str, Any], seed: int) -> TextArenaSession:
    """Make the game that the record names."""
    textarena = package("textarena", "textarena")
    return TextArenaSession(textarena.make(column(task, "env_id"), **task.get("env_options", {})), seed)
