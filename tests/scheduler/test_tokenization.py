"""From prompts to token ids, with a tokenizer of one token per byte and templates of all kinds."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace

import pytest

from gpu_worker.engine.stub import stub_model_card
from scheduler.tokenization import PromptTokenizer
from wire.errors import ForebayError, InvalidRequest, ModelError, RequestTooLong
from wire.ids import RequestId, TokenIds, token_ids
from wire.messages import ChatMessage, ModelCard, Prompt, Request
from wire.sampling import SamplingParams

CARD = stub_model_card(max_model_len=10)
CHAT = Prompt(messages=(ChatMessage("system", "Sys"), ChatMessage("user", "<Hi> & 'ü'")))


def tokenize(
    prompt: Prompt, card: ModelCard = CARD, *, max_tokens: int | None = None
) -> TokenIds | ForebayError:
    sampling = SamplingParams(max_tokens=max_tokens)
    [outcome] = PromptTokenizer(card).tokenize([Request(RequestId("r"), prompt, sampling)])
    return outcome


def refusal(prompt: Prompt, card: ModelCard = CARD, *, max_tokens: int | None = None) -> str:
    outcome = tokenize(prompt, card, max_tokens=max_tokens)
    assert isinstance(outcome, InvalidRequest)
    return str(outcome)


def with_template(source: str | None) -> ModelCard:
    return replace(CARD, chat_template=source, max_model_len=2000)


def rendered(source: str, prompt: Prompt = CHAT) -> str:
    """The text that a template makes, as its tokens show it."""
    ids = tokenize(prompt, with_template(source))
    assert isinstance(ids, array), ids
    tokenizer = PromptTokenizer(CARD)._tokenizer
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    return text


# Prompts


def test_text_is_tokenized_and_a_bos_token_put_in_front_where_the_model_wants_one() -> None:
    plain = tokenize(Prompt(text="ab"))
    assert isinstance(plain, array)
    assert len(plain) == 2
    card = replace(CARD, bos_token_id=5, add_bos_token=True)
    assert tokenize(Prompt(text="ab"), card) == token_ids([5, *plain])
    assert tokenize(Prompt(text="ab"), replace(card, add_bos_token=False)) == plain


def test_token_ids_are_taken_as_they_are() -> None:
    ids = token_ids([0, 256])
    assert tokenize(Prompt(token_ids=ids), replace(CARD, bos_token_id=5, add_bos_token=True)) == ids


def test_a_token_id_that_the_model_does_not_have_is_named() -> None:
    message = refusal(Prompt(token_ids=token_ids([0, 257])))
    assert message == "prompt holds token id 257; stub has ids 0 to 256"


@pytest.mark.parametrize(
    "prompt", [Prompt(text=""), Prompt(token_ids=token_ids()), Prompt(messages=())]
)
def test_a_prompt_without_tokens_is_refused(prompt: Prompt) -> None:
    assert "the prompt has no tokens" in refusal(prompt)


def test_one_bad_prompt_leaves_its_neighbours_alone() -> None:
    requests = [
        Request(RequestId(name), Prompt(text=text)) for name, text in [("a", "x"), ("b", "")]
    ]
    good, bad, again = PromptTokenizer(CARD).tokenize([*requests, requests[0]])
    assert good == again
    assert isinstance(bad, InvalidRequest)


# The context: 10 tokens, prompt and output together


def test_a_prompt_must_leave_room_for_one_token() -> None:
    assert isinstance(tokenize(Prompt(text="x" * 9)), array)
    outcome = tokenize(Prompt(text="x" * 10))
    assert isinstance(outcome, RequestTooLong)
    assert outcome.field == "prompt"
    assert "has 10 tokens; stub takes 10 with the output, so at most 9" in str(outcome)


def test_prompt_and_max_tokens_must_fit_together() -> None:
    assert isinstance(tokenize(Prompt(text="x" * 6), max_tokens=4), array)
    outcome = tokenize(Prompt(text="x" * 6), max_tokens=5)
    assert isinstance(outcome, RequestTooLong)
    assert outcome.field == "max_tokens"
    assert "at most 4 fit" in str(outcome)


# Chat templates


def test_a_template_gets_the_messages_and_what_huggingface_documents() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "[{{ m['role'] }}] {{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}{{ eos_token }}"
    )
    assert rendered(source) == "[system] Sys[user] <Hi> & 'ü'[assistant]<|end|>"


def test_tojson_leaves_text_as_it_is() -> None:
    assert rendered("{{ messages[1] | tojson }}") == ('{"role": "user", "content": "<Hi> & \'ü\'"}')


def test_a_template_may_ask_for_the_date() -> None:
    assert rendered("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_a_template_refuses_messages_with_raise_exception() -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    assert refusal(CHAT, with_template(source)) == (
        "messages do not fit the chat template of stub: roles must alternate"
    )


def test_messages_need_a_template() -> None:
    assert "has no chat template" in refusal(CHAT, with_template(None))
    assert isinstance(tokenize(Prompt(text="x"), with_template(None)), array)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.datetime.sys }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.__reduce_ex__(4) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_hostile_template_reaches_nothing(source: str) -> None:
    assert "do not fit the chat template" in refusal(CHAT, with_template(source))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ messages | map(attribute='__class__') | join }}",
        "{{ self.__init__ }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_an_unsafe_attribute_is_as_good_as_undefined(source: str) -> None:
    assert "no tokens" in refusal(CHAT, with_template(source))


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 // 0 }}",
        "{{ nothing.at_all }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ range(100000000) | length }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ strftime_now() }}",
        "{{ messages | tojson('x', 'y', 'z') }}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_the_requests_failure_alone(source: str) -> None:
    assert "do not fit the chat template" in refusal(CHAT, with_template(source))


@pytest.mark.parametrize(
    "card",
    [
        with_template("{% if %}"),
        with_template("{{ x | no_such_filter }}"),
        replace(CARD, tokenizer_json=b"{}"),
        replace(CARD, tokenizer_json=b"\xff"),
    ],
)
def test_a_card_that_cannot_be_used_is_a_model_error(card: ModelCard) -> None:
    with pytest.raises(ModelError, match="the model card of stub cannot be used"):
        PromptTokenizer(card)
