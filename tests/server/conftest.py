"""SDKs as clients of the server that a module's ``host`` fixture runs."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest


@pytest.fixture
def client(host) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{host.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def claude(host) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=host.url, api_key="none", max_retries=0) as made:
        yield made
