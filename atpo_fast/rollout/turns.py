"""Write turns: the request of a branch to the engine, the call in its completion, and the observation after it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from atpo_fast.config import RolloutConfig, ToolsConfig
from atpo_fast.engines.base import Completion, Request, SamplingParams
from atpo_fast.environment.decoding import decode
from atpo_fast.environment.escaping import Escaper
from atpo_fast.environment.session import Message
from atpo_fast.environment.tags import (
    CALL_LIMIT_NOTICE,
    ToolCall,
    close_tag,
    format_result,
    parse_call,
    result_closing,
    result_opening,
)
from atpo_fast.rollout.branch import Branch, WrittenTurn
from atpo_fast.tree.turn_tree import TokenIds, Turn

_OPENING_TOKENS = 20  # tokens of a turn of which the opening entropy is (published)


class TurnWriter:
    """The translation of branches into requests, completions into turns and calls, and results into token ids.

    Args:
        tokenizer: reads calls from turns and encodes observations; sampled tokens are never encoded again.
        names: names of the tools.
        rollout: sampling and limits.
        tools: call limit and length of results.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], rollout: RolloutConfig, tools: ToolsConfig
    ) -> None:
        self.tokenizer, self.names, self.rollout, self.tools = tokenizer, tuple(names), rollout, tools
        self.notice = self._encode(CALL_LIMIT_NOTICE)  # what answers calls over the limit
        self.end_token: int = tokenizer.eos_token_id  # what ends calls over the limit, where no notice does
        self._stop = tuple(close_tag(name) for name in names)
        self._opening_tokens = len(self._encode(result_opening()))
        self._closing = self._encode(result_closing())
        self._escape = Escaper(tokenizer, self.names)
        self._vocabulary = len(tokenizer.get_vocab())

    def request(self, branch: Branch, greedy: bool, top_logprobs: int = 0) -> Request:
        """Build the request for a branch's next turn; `top_logprobs` candidates are told with each token."""
        search, rollout = branch.search, self.rollout
        room = search.token_limit - len(branch.prompt_ids)
        sampling = SamplingParams(
            max_new_tokens=min(room, rollout.max_turn_tokens or room, branch.start.tokens or room),
            temperature=0.0 if greedy else rollout.temperature,
            top_p=1.0 if greedy else rollout.top_p,
            top_k=0 if greedy else rollout.top_k,
            stop=self._stop,
            top_logprobs=top_logprobs,
        )
        return Request(
            prompt_ids=branch.prompt_ids.tolist(),
            sampling=sampling,
            seed=branch.seed,
            path=branch.path,
            turn_key=(search.key, search.next_number()),
        )

    def write(self, branch: Branch, number: int, completion: Completion) -> ToolCall | None:
        """Append the turn `number` to its branch, and return the call in it."""
        turn = branch.write(number, completion)
        if completion.top_logprobs is not None:
            turn.entropy = opening_entropy(completion.top_logprobs, self._vocabulary)
        if completion.finish_reason != "stop":
            return None
        text = self.tokenizer.decode(
            completion.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        call = parse_call(str(text), self.names)
        if call is not None and not call.problem and self.may_call(branch):
            turn.tool = call.tool
        return call

    def transcript(self, branch: Branch) -> list[Message]:
        """Write what a branch's trajectory consists of, as a session scores it."""
        tree = branch.search.tree
        messages: list[Message] = [{"role": "user", "content": str(tree.meta.get("question", ""))}]
        before = [tree.turns[n] for n in tree.path(branch.start.turn)[1:]]
        turns: list[Turn | WrittenTurn] = [*before, *branch.turns]
        for turn in turns:
            messages.append({"role": "assistant", "content": decode(self.tokenizer, turn.action_ids.tolist())})
            if len(turn.observation_ids):
                text = decode(self.tokenizer, turn.observation_ids.tolist())
                text = text.removeprefix(result_opening()).removesuffix(result_closing())
                messages.append({"role": "tool", "content": text})
        return messages

    def may_call(self, branch: Branch) -> bool:
        """Tell whether the branch may call a tool once more."""
        return branch.calls < self.tools.call_limit

    def observations(self, texts: Sequence[str]) -> list[TokenIds]:
        """Encode results, each distinct text once, and cut them to `max_result_tokens`."""
        encoded = {
            text: self.cut(self._encode(format_result(text, self._escape)), self.tools.max_result_tokens)
            for text in dict.fromkeys(texts)
        }
        return [encoded[text] for text in texts]

    def cut(self, observation: TokenIds, room: int) -> TokenIds:
        """Cut a result to at most `room` tokens, its closing tag included; to nothing where no text would be left."""
        if len(observation) <= room:
            return observation
        kept = room - len(self._closing)
        return np.concatenate([observation[:kept], self._closing]) if kept > self._opening_tokens else observation[:0]

    def _encode(self, text: str) -> TokenIds:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)


def opening_entropy(
    top_logprobs: Sequence[Sequence[float]],  # for each token, those of its candidates, the sampled token among them
    vocabulary: int,
) -> float:
    """Sum `-p ln p / ln(vocabulary)` over the candidates of a turn's first 20 tokens; 0 without any token.

    It is a sum over tokens, not a mean, and the probabilities are not normalised: as published (ARPO,
    arXiv:2507.19849; docs/design.md#entropy-branching).
    """
    logprobs = np.array([value for token in islice(top_logprobs, _OPENING_TOKENS) for value in token])
    return float(-(np.exp(logprobs) * logprobs).sum() / np.log(vocabulary))
