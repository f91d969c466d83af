# SPDX-License-Identifier: Apache-2.0
"""Generation: loop, batching, stops, streams, capture, chat."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest

from gemma4 import CapacityError, StateError
from gemma4.generation.pieces import TurnText


def greedy_by_hand(model, ids, n):
    ids = list(ids)
    for _ in range(n):
        ids.append(int(model.forward(ids, logits="last").argmax()))
    return ids[-n:]


def test_greedy_equals_repeated_forward(random_e, prompt):
    out = random_e.generate(prompt, max_tokens=20, temperature=0, stop_ids=())
    assert out.tokens.tolist() == greedy_by_hand(random_e, prompt, 20)
    assert out.tokens.dtype == np.int32
    assert out.finish_reason == "length" and out.prompt_tokens == 12


def test_batch_equals_single_runs(random_e, prompt):
    prompts = [prompt, prompt[:2], prompt[4:9]]
    batch = random_e.generate(prompts, max_tokens=10, temperature=0)
    for one, ids in zip(batch, prompts, strict=True):
        assert one.tokens.tolist() == random_e.generate(ids, max_tokens=10, temperature=0).tokens.tolist()


def test_batch_members_stop_on_their_own(random_e, prompt):
    a = greedy_by_hand(random_e, prompt, 8)
    stop = a[2]
    out = random_e.generate([prompt, prompt[:3]], max_tokens=8, temperature=0, stop_ids=[stop])
    assert out[0].tokens.tolist() == a[: a.index(stop) + 1] and out[0].finish_reason == "stop"
    assert len(out[1].tokens) > 0


def test_seed_reproduces_and_varies(random_e, prompt):
    options = {"max_tokens": 12, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
    a, b, c = (random_e.generate(prompt, seed=s, **options).tokens.tolist() for s in (7, 7, 8))
    assert a == b != c
    many = random_e.generate([prompt, prompt], seed=7, **options)
    assert many[0].tokens.tolist() == a != many[1].tokens.tolist()


def test_sampling_defaults_are_the_checkpoints(random_dir, prompt, tmp_path):
    import shutil

    import gemma4

    copy = tmp_path / "model"
    shutil.copytree(random_dir, copy)
    wanted = greedy_by_hand(gemma4.load(random_dir), prompt, 6)
    (copy / "generation_config.json").write_text(f'{{"do_sample": false, "eos_token_id": [{wanted[3]}]}}')
    out = gemma4.load(copy).generate(prompt, max_tokens=6)
    assert out.tokens.tolist() == wanted[: wanted.index(wanted[3]) + 1] and out.finish_reason == "stop"


def test_processors_and_bias(random_e, prompt):
    seen = []

    def only_44(ids, logits):
        seen.append(ids.tolist())
        logits[:] = -np.inf
        logits[44] = 0

    out = random_e.generate(prompt, max_tokens=3, processors=(only_44,))
    assert out.tokens.tolist() == [44, 44, 44]
    assert seen == [prompt.tolist(), [*prompt, 44], [*prompt, 44, 44]]
    assert random_e.generate(prompt, max_tokens=2, temperature=0, logit_bias={45: 1e4}).tokens.tolist() == [45, 45]


def test_logprobs(random_e, prompt):
    out = random_e.generate(prompt, max_tokens=4, temperature=0, logprobs=3)
    assert out.logprobs is not None and len(out.logprobs) == 4
    logits = random_e.forward(prompt, logits="last")[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    first = out.logprobs[0]
    assert first.logprob == pytest.approx(expected.max(), abs=1e-4)
    assert [i for i, _ in first.top_logprobs] == np.argsort(-expected)[:3].tolist()
    assert random_e.generate(prompt, max_tokens=1).logprobs is None


def test_capture_covers_prompt_and_generated(random_e, prompt):
    names = ["blocks.*.hook_resid_post", "blocks.2.attn.hook_pattern", "blocks.2.attn.hook_attn_scores"]
    out = random_e.generate(prompt, max_tokens=6, temperature=0, capture=names)
    ran = np.concatenate([prompt, out.tokens[:-1]])
    np.testing.assert_array_equal(out.cache.tokens, ran)
    np.testing.assert_array_equal(out.cache.positions, np.arange(len(ran)))
    _, whole = random_e.run_with_cache(ran, names)
    for name in whole:
        np.testing.assert_array_equal(out.cache[name], whole[name], err_msg=name)
    assert random_e.generate(prompt, max_tokens=1).cache is None


def test_hooks_act_while_generating(random_e, prompt):
    seen = []

    def force(array, site):
        seen.append(site.start)
        array[:] = -30
        array[:, 50] = 30

    out = random_e.generate(prompt, max_tokens=3, temperature=0, hooks=[("hook_logits", force)])
    assert out.tokens.tolist() == [50, 50, 50] and seen == [0, 12, 13]
    with random_e.hooks([("hook_logits", force)]):
        stream = random_e.stream(prompt, max_tokens=3, temperature=0)
    for _ in stream:
        pass
    assert stream.result.tokens.tolist() == [50, 50, 50]  # the hooks of where the stream was made


def test_hooks_know_the_prompt_when_others_have_finished(random_e, prompt):
    first = greedy_by_hand(random_e, prompt, 1)[0]
    seen = []
    hook = ("blocks.0.hook_resid_pre", lambda array, site: seen.append((site.sequence, site.start)))
    other = prompt[:3]
    assert greedy_by_hand(random_e, other, 1)[0] != first
    options = {"max_tokens": 2, "temperature": 0, "stop_ids": [first], "hooks": [hook]}
    random_e.generate([prompt, other], **options)
    assert seen == [(0, 0), (1, 0), (1, 3)]


def test_context_end_is_length(random_e):
    ids = np.full(250, 5, dtype=np.int32)
    out = random_e.generate(ids, max_tokens=100, temperature=0, stop_ids=())
    assert out.finish_reason == "length" and len(out.tokens) == 256 - 250 + 1


def test_prompt_longer_than_the_context(random_e):
    steps = []
    hook = ("hook_embed", lambda array, site: steps.append(1))
    with pytest.raises(CapacityError, match=r"257 tokens.*context is 256"):
        random_e.generate(np.full(257, 5, dtype=np.int32), hooks=[hook])
    assert not steps  # nothing was computed


def test_bad_options(random_e, prompt):
    with pytest.raises(ValueError, match="max_tokens"):
        random_e.generate(prompt, max_tokens=0)
    with pytest.raises(TypeError, match="max_new_tokens"):
        random_e.generate(prompt, max_new_tokens=3)
    with pytest.raises(ValueError, match="temperature"):
        random_e.generate(prompt, temperature=-1)


def test_sequence_reuse_takes_the_common_prefix(random_e, prompt):
    expected = random_e.generate(np.append(prompt[:8], [77, 78]), max_tokens=5, temperature=0)
    with random_e.new_sequence() as s:
        first = random_e.generate(prompt, max_tokens=3, temperature=0, sequence=s)
        assert first.timings.prefill_tokens == 12
        again = random_e.generate(np.append(prompt, first.tokens), max_tokens=3, temperature=0, sequence=s)
        assert again.timings.prefill_tokens == 1  # only the last token had not been run
        branch = random_e.generate(np.append(prompt[:8], [77, 78]), max_tokens=5, temperature=0, sequence=s)
        assert branch.tokens.tolist() == expected.tokens.tolist()


def test_same_prompt_again_runs_one_token(random_e, prompt):
    with random_e.new_sequence() as s:
        a = random_e.generate(prompt, max_tokens=1, temperature=0, sequence=s)
        b = random_e.generate(prompt, max_tokens=1, temperature=0, sequence=s)
    assert a.tokens.tolist() == b.tokens.tolist() and b.timings.prefill_tokens == 1


# -- text ----------------------------------------------------------------------------------------------------------


def test_stream_joins_to_the_text(tiny):
    stream = tiny.stream("Once upon a time", max_tokens=24, temperature=0)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.result.text == str(stream.result)
    assert stream.result.text == tiny.generate("Once upon a time", max_tokens=24, temperature=0).text
    assert stream.result.timings.decode_rate > 0 and stream.result.timings.prefill_rate > 0


def test_stop_string_across_pieces(tiny):
    whole = tiny.generate("Once upon a time", max_tokens=24, temperature=0).text
    stop = whole[7:12]
    stream = tiny.stream("Once upon a time", max_tokens=24, temperature=0, stop=stop)
    pieces = list(stream)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert stream.result.finish_reason == "stop"


def test_held_back_text_comes_out_at_the_end(tiny):
    whole = tiny.generate("Once upon a time", max_tokens=8, temperature=0).text
    out = tiny.generate("Once upon a time", max_tokens=8, temperature=0, stop=whole[-1] + "\x00never")
    assert out.text == whole and out.finish_reason == "length"


def test_pieces_are_whole_characters(tiny):
    """Byte tokens come out when their character is complete, never as replacement characters before."""
    text = "caf\u00e9 \u2603 \U0001f600!"
    ids = iter([*tiny.to_tokens(text, bos=False).tolist(), 1])

    def spell(so_far, logits):
        logits[:] = -np.inf
        logits[next(ids)] = 0

    pieces = list(tiny.stream("x", max_tokens=64, processors=(spell,), stop_ids=[1]))
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces) and all(pieces)


def test_closing_a_stream_early(tiny):
    stream = tiny.stream("Once upon a time", max_tokens=200, temperature=0)
    next(stream)
    with pytest.raises(StateError, match="has not ended"):
        _ = stream.result
    stream.close()
    stream.close()
    assert stream.result.finish_reason == "cancelled" and list(stream) == []
    assert stream._continuation.sequence.closed


def test_leaving_the_loop_frees_the_sequence(tiny):
    stream = tiny.stream("Once upon a time", max_tokens=200, temperature=0)
    for _ in stream:
        break
    sequence = stream._continuation.sequence
    del stream
    gc.collect()
    assert sequence.closed


def test_closing_leaves_the_users_sequence(tiny):
    with tiny.new_sequence() as s:
        with tiny.stream("Once upon a time", max_tokens=200, temperature=0, sequence=s) as stream:
            next(stream)
        assert not s.closed and s.length >= 4


def test_stream_takes_one_prompt(tiny):
    with pytest.raises(ValueError, match="one prompt"):
        tiny.stream(["a", "b"])


def test_list_of_texts(tiny):
    out = tiny.generate(["Once upon a time", "The"], max_tokens=5, temperature=0)
    assert [len(g.tokens) for g in out] == [5, 5]
    assert out[0].text == tiny.generate("Once upon a time", max_tokens=5, temperature=0).text


# -- chat ----------------------------------------------------------------------------------------------------------


def test_messages_go_through_the_checkpoints_template(tiny):
    messages = [{"role": "user", "content": "Hello"}]
    out = tiny.generate(messages, max_tokens=32, temperature=0)
    rendered = tiny.chat_template.render(messages)
    assert out.prompt_tokens == len(tiny.to_tokens(rendered, bos=False))
    raw = tiny.generate(tiny.to_tokens(rendered, bos=False), max_tokens=32, temperature=0)
    assert out.tokens.tolist() == raw.tokens.tolist()
    assert "<|turn>" not in out.text and "<turn|>" not in out.text


def test_chat_turns_reuse_the_cache(tiny):
    messages = [{"role": "user", "content": "Hello"}]
    with tiny.new_sequence() as s:
        first = tiny.generate(messages, max_tokens=16, temperature=0, sequence=s)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And you?"}]
        second = tiny.generate(messages, max_tokens=16, temperature=0, sequence=s)
    assert second.timings.prefill_tokens < second.prompt_tokens
    fresh = tiny.generate(messages, max_tokens=16, temperature=0)
    assert second.tokens.tolist() == fresh.tokens.tolist()


def test_messages_without_a_template(random_e):
    with pytest.raises(StateError, match="no chat template"):
        random_e.generate([{"role": "user", "content": "Hello"}])


def pieces_of(tiny, text, show_thinking=False, prompt="<|turn>model\n"):
    flow = TurnText(tiny.tokenizer, tiny.to_tokens(prompt), show_thinking)
    pieces = [p for token in tiny.to_tokens(text, bos=False) for p in flow.push(int(token))] + flow.flush()
    return flow, pieces


TURN = "<|channel>thought\nhm, two<channel|>It is 2.<|tool_call>call:add{a:1,b:2}<tool_call|>"


def test_turn_shows_the_answer_only(tiny):
    flow, pieces = pieces_of(tiny, TURN)
    assert "".join(pieces) == "It is 2."
    turn = flow.parsed()
    assert turn.thinking == "hm, two" and turn.content == "It is 2."
    assert turn.tool_calls[0].name == "add" and turn.tool_calls[0].arguments == {"a": 1, "b": 2}


def test_turn_shows_thinking_when_asked(tiny):
    _, pieces = pieces_of(tiny, TURN, show_thinking=True)
    assert "".join(p for p in pieces if p.channel == "thinking") == "hm, two"
    assert "".join(p for p in pieces if p.channel == "text") == "It is 2."


def test_turn_that_starts_inside_a_thought(tiny):
    flow, pieces = pieces_of(tiny, "so<channel|>Yes.", prompt="<|turn>model\n<|channel>thought\n")
    assert "".join(pieces) == "Yes." and flow.parsed().thinking == "so"
    _, pieces = pieces_of(tiny, "Yes.", prompt="<|turn>model\n<|channel>thought\n<channel|>")
    assert "".join(pieces) == "Yes."


# -- closing from elsewhere ------------------------------------------------------------------------------------------


def test_close_from_another_thread(tiny):
    """While a reader waits for a step, before it began, after it ended, many times at once: never an error."""
    for delay in (0.0, 0.005, 0.05):
        slow = (lambda ids, logits: time.sleep(0.005),)
        stream = tiny.stream("Once upon a time", max_tokens=400, seed=1, stop_ids=(), processors=slow)
        errors, pieces = [], []

        def read(stream=stream, pieces=pieces, errors=errors):
            try:
                pieces.extend(stream)
            except BaseException as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(delay)
        closers = [threading.Thread(target=stream.close) for _ in range(3)]
        for thread in closers:
            thread.start()
        for thread in [*closers, reader]:
            thread.join(30)
            assert not thread.is_alive()
        assert not errors
        assert stream.result.finish_reason == "cancelled" and stream.result.text.startswith("".join(pieces))
        assert stream._continuation.sequence.closed


def test_close_in_a_processor_of_the_stream_itself(tiny):
    calls = []

    def stop(ids, logits):
        calls.append(len(ids))
        if len(calls) == 3:
            stream.close()

    stream = tiny.stream("Once", max_tokens=20, temperature=0, processors=(stop,))
    pieces = list(stream)
    assert len(calls) == 3 and stream.result.finish_reason == "cancelled"
    assert stream.result.text == "".join(pieces) and len(stream.result.tokens) == 3


def test_reading_a_stream_within_itself(tiny):
    stream = tiny.stream("Once", max_tokens=20, processors=(lambda ids, logits: next(stream),))
    with pytest.raises(StateError, match="while it computes"):
        next(stream)


def test_two_readers_share_the_pieces(tiny):
    whole = tiny.generate("Once upon a time", max_tokens=40, temperature=0).text
    stream = tiny.stream("Once upon a time", max_tokens=40, temperature=0)
    found: list[list[str]] = [[], []]
    readers = [threading.Thread(target=pieces.extend, args=(stream,)) for pieces in found]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert (
        sorted(found[0] + found[1]) == sorted(tiny.stream("Once upon a time", max_tokens=40, temperature=0))
        and stream.result.text == whole
    )
