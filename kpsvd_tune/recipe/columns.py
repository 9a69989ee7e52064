"""The roles that columns of a dataset may play, in training and in evaluation alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

# pydantic asks for typing_extensions' TypedDict below Python 3.12, and depends on that package.
from typing_extensions import TypedDict

from kpsvd_tune.recipe.values import CLOSED, Text


class Columns(TypedDict, total=False):
    """Which column of the dataset plays which role."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]  # pydantic's documented place for it
    prompt: Annotated[Text, Field(description="column with the prompt")]
    completion: Annotated[Text, Field(description="column with the text to learn")]
    system: Annotated[Text, Field(description="column with the system prompt")]
    instruction: Annotated[Text, Field(description="column with an alpaca instruction")]
    input: Annotated[Text, Field(description="column with an alpaca input")]
    output: Annotated[Text, Field(description="column with an alpaca output")]
    history: Annotated[Text, Field(description="column with earlier rounds of an alpaca row")]
    messages: Annotated[Text, Field(description="column with a list of chat messages")]
    conversations: Annotated[Text, Field(description="column with a sharegpt conversation")]
    text: Annotated[Text, Field(description="column with plain text, all of it learnt")]
