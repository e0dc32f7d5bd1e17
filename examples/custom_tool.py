"""A tool of your own: a typed Python function, what the policy reads about it, and a call from tag to answer.

Run it with `python examples/custom_tool.py`; it needs no model, no network and no GPU. In a training run the function
is named in the configuration instead: `tools.functions=[examples.custom_tool:convert]`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atpo_fast.data.prompts import PROMPTS, SYSTEM_PROMPT
from atpo_fast.data.questions import Question
from atpo_fast.data.tokenizers import train_bpe
from atpo_fast.environment import Escaper, FunctionTool, ToolBox, describe_tools, format_result, parse_call
from atpo_fast.task import PromptEncoder

METRES = {"km": 1000.0, "mi": 1609.344}


def convert(
    value: Annotated[float, Field(ge=0, description="Length to convert.")],
    unit: Annotated[Literal["km", "mi"], Field(description="Unit that the value is given in.")],
    digits: int = 1,
) -> str:
    """Convert a length from kilometres to miles, or from miles to kilometres."""
    other = "mi" if unit == "km" else "km"
    return f"{value * METRES[unit] / METRES[other]:.{digits}f} {other}"


def main() -> None:
    """Show the prompt, then a good call and a bad one with the observations that answer them."""
    # 1. The docstring and the type hints become a description, and that a part of the prompt. A tokenizer with a chat
    #    template that shows tools gets them through its `tools` argument; this one has no template.
    tool = FunctionTool(convert)
    tokenizer = train_bpe([SYSTEM_PROMPT], vocab_size=600)  # in a run: the tokenizer of the model
    with ToolBox([tool]) as toolbox:
        prompt = PROMPTS["published"]
        tools = describe_tools(toolbox.schemas(), tokenizer, prompt)
        question = Question(id="q", text="How many miles are 42 km?", answers=("26.1 mi",))
        prompt_ids = PromptEncoder(prompt, tokenizer, max_tokens=4000, tools=tools)(question)
        print("--- prompt, after the published instructions")
        print(tokenizer.decode(prompt_ids).partition(SYSTEM_PROMPT)[2].strip())

        # 2. The policy writes a call, and generation stops at the closing tag. The argument is read as JSON and
        #    checked; what does not fit is answered with what is wrong, so that the policy can try again.
        for turn in (
            '<think> I convert it. </think> <convert> {"value": 42, "unit": "km"} </convert>',
            '<think> I convert it. </think> <convert> {"value": 42, "unit": "yd"} </convert>',
        ):
            call = parse_call(turn, toolbox.names)
            assert call is not None
            (result,) = toolbox.run([call])

            # 3. The answer goes on in the same message, between result tags; no gradient flows through it.
            print(f"--- turn\n{turn}{format_result(result.text, Escaper(tokenizer, toolbox.names))}")


if __name__ == "__main__":
    main()
