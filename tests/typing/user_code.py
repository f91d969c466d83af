# SPDX-License-Identifier: Apache-2.0
"""What users write, for pyright in strict mode (tests/test_typing.py): each line marked `# error:` must be refused."""

from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import gemma4
from gemma4.dictionaries import AblateFeature, ClampFeature, Fired
from gemma4.generation import Batch, Continuation, Options
from gemma4.generation.sampling import SamplingParams
from gemma4.interp.lens import LogitLens, logit_lens
from gemma4.media import image
from gemma4.media.boxes import draw_boxes, parse_boxes
from gemma4.media.tasks import detect
from gemma4.quantization import compare

F32 = NDArray[np.float32]

model = gemma4.load("tiny-e", threads=2, precision="exact")
assert_type(model, gemma4.Model)
gemma4.load("tiny-e", precision="quick")  # error: reportArgumentType
gemma4.load("tiny-e", thread=2)  # error: reportCallIssue

# ---- tokens and logits
ids = model.to_tokens("Once upon a time")
assert_type(ids, NDArray[np.int32])
assert_type(model.forward(ids), F32)
assert_type(model.forward("Once"), F32)
assert_type(model.forward([2, 5, 6], logits="last"), F32)
assert_type(model.forward(ids, logits=[0, 3]), F32)
assert_type(model.forward(ids, logits=None), None)
assert_type(model.forward(["Once", "upon"]), list[F32])
assert_type(model.forward([[2, 5], [2, 6, 7]], logits=slice(0, 1)), list[F32])
assert_type(model.forward([ids, ids], logits=None), list[None])
model.forward(ids, logits="first")  # error: reportCallIssue
model.forward(3.5)  # error: reportCallIssue

with model.new_sequence(capacity=64, kv_dtype="f16") as sequence:
    assert_type(sequence, gemma4.Sequence)
    assert_type(model.forward(ids, sequence=sequence), F32)
    model.forward(["Once", "upon"], sequence=sequence)  # error: reportCallIssue
    model.new_sequence(kv_dtype="f64")  # error: reportArgumentType

# ---- activations and edits
logits, cache = model.run_with_cache("Once", "blocks.*.hook_resid_post", pos=-1)
assert_type(logits, F32)
assert_type(cache, gemma4.ActivationCache)
assert_type(cache["resid_post", 3], F32)
assert_type(model.run_with_cache("Once", logits=None)[0], None)
assert_type(model.run_with_cache("Once", stop_at_layer=2)[0], None)
assert_type(model.run_with_cache(["Once", "upon"]), tuple[list[F32], list[gemma4.ActivationCache]])
model.run_with_cache("Once", lambda name: name.endswith("hook_z"))
model.run_with_cache("Once", 5)  # error: reportCallIssue
model.run_with_cache("Once", names_filter=lambda name: name.endswith("hook_z"))
model.run_with_cache("Once", names_filters="hook_embed")  # error: reportCallIssue
assert_type(model.run_from(cache["resid_pre", 3], 3, "Once")[0], F32)
assert_type(model.run_from([cache["resid_pre", 3]], 3, ["Once"], logits=None)[0], list[None])
model.run_from(cache["resid_pre", 3], "3", "Once")  # error: reportCallIssue
assert_type(cache.norms("resid_post", by="head").values, F32)
cache.norms("resid_post", by="heads")  # error: reportArgumentType
cache.save("x.safetensors", dtype="f64")  # error: reportArgumentType
assert_type(gemma4.ActivationCache.load("x.safetensors"), gemma4.ActivationCache)


def double(array: F32, site: gemma4.HookPoint) -> F32:
    return array * 2


def in_place(array: F32, site: gemma4.HookPoint) -> None:
    array[-1] = 0


def of_one_argument(array: F32) -> F32:
    return array


assert_type(model.run_with_hooks("Once", [("blocks.1.hook_mlp_out", double)]), F32)
assert_type(model.run_with_hooks(["Once", "upon"], [("blocks.1.hook_mlp_out", in_place)]), list[F32])
with model.hooks([("blocks.*.attn.hook_pattern", double), (["hook_embed"], in_place)]):
    pass
model.hooks([("blocks.1.hook_mlp_out", of_one_argument)])  # error: reportArgumentType

# ---- generation
out = model.generate("Once upon a time", max_tokens=40, temperature=0, stop="\n", stop_ids=[1], seed=None)
assert_type(out, gemma4.Generation)
assert_type(out.text, str)
assert_type(out.tokens, NDArray[np.int32])
messages = [{"role": "user", "content": "What is the capital of France?"}]
assert_type(model.generate(messages, think=True), gemma4.Generation)
assert_type(model.generate([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]), gemma4.Generation)
assert_type(model.generate(["Once", "upon"], top_k=5, hooks=[("hook_embed", double)]), list[gemma4.Generation])
assert_type(model.generate([messages, messages]), list[gemma4.Generation])
assert_type(model.generate([ids, ids], capture="blocks.*.hook_z"), list[gemma4.Generation])
model.generate("Once", max_new_tokens=5)  # error: reportCallIssue
model.generate("Once", max_tokens="5")  # error: reportCallIssue
model.generate("Once", tools={"name": "f"})  # error: reportCallIssue
for piece in model.stream(messages, max_tokens=5):
    assert_type(piece.channel, str)
stream = model.stream("Once")
assert_type(stream, gemma4.TextStream)
assert_type(stream.result, gemma4.Generation)
model.stream("Once", max_length=3)  # error: reportCallIssue

with Batch(model) as batch:
    one = batch.join("Once", Options(max_tokens=3))
    assert_type(one, Continuation)
    one.propose([5, 6])
    batch.step()
    assert_type(one.result(), gemma4.Generation)

# ---- modules that users import
assert_type(logit_lens(model, "Once", target=" upon", pos=-1), LogitLens)
logit_lens(model, "Once", pos="first")  # error: reportArgumentType
assert_type(cache.join([cache]), gemma4.ActivationCache)
boxes = parse_boxes(out.text)
assert_type(boxes[0].box, tuple[float, float, float, float] | None)
draw_boxes(np.zeros((48, 48, 3), np.uint8), boxes).save("boxes.png")
assert_type(image.preprocess("a.png", 70).patches, F32)
image.preprocess("a.png", "70")  # error: reportArgumentType
found, answer = detect(model, "a.png", "a car", max_tokens=200)
assert_type(answer, gemma4.Generation)
detect(model, "a.png", "a car", max_new_tokens=200)  # error: reportCallIssue
assert_type(compare(model, model, ids).kl_mean, float)
SamplingParams(temperature="0")  # error: reportArgumentType

# ---- dictionaries
sae = gemma4.SAE.load("folder", site="blocks.3.hook_resid_post")
assert_type(sae, gemma4.SAE)
features = sae.encode(cache)
assert_type(features, gemma4.Features)
assert_type(features[3], Fired)
assert_type(features[3:], gemma4.Features)
assert_type(sae.decode(features), F32)
assert_type(sae.metrics(np.zeros((3, 8), np.float32)).l0, float)
gemma4.SAE.load("folder", site_out="blocks.3.hook_mlp_out")  # error: reportCallIssue
with model.attach(sae, error=False) as record, model.edit([ClampFeature(sae, 5, 2.0, pos=-1)]):
    assert_type(record.features(), gemma4.Features)
model.attach("folder")  # error: reportCallIssue
clt = gemma4.CrossLayerTranscoder.load("folder")
with model.attach(clt) as layers, model.edit(AblateFeature(clt, (3, 5))):
    assert_type(layers.features(), list[gemma4.Features])
    assert_type(layers.layers[2].features(), gemma4.Features)

# ---- the rest of the face
assert_type(model.encode_image("a.png", image_tokens=70), F32)
assert_type(model.encode_audio(np.zeros(16_000, np.float32), rate=16_000), F32)
model.encode_video("a.mp4", frames=3)  # error: reportCallIssue
assert_type(model.weight("norm.weight"), F32)
assert_type(model.to_single_token(" time"), int)
print(model.info().parameters, gemma4.cpu_info()["isa"], gemma4.shipped_models())
