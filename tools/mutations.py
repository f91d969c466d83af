# SPDX-License-Identifier: Apache-2.0
"""The one-line mistakes that tools/mutate.py plants, each with the tests that should see it.

`old` stands exactly once in the sources (csrc/ without its tests, gemma4/), in whichever file; `new` replaces it.
Tests are named by file below tests/, without "test_" and ".py", and run in that order until one fails; "csrc" is the C
test program.
"""

from typing import NamedTuple


class Mistake(NamedTuple):
    """`old` becomes `new`; a mistake that no test sees is a hole in the tests."""

    what: str
    old: str
    new: str
    tests: str


SITES, EXACT, FAST = "reference/reference_sites", "reference/exactness", "fast reference/plain_fast"
MEDIA = "reference/multimodal reference/media_models"
MODEL = f"{SITES} {EXACT} api load"
VISION = "reference/vision reference/fast_encoders reference/media_hooks"
AUDIO = "reference/audio reference/fast_encoders reference/media_hooks"
KERNELS = "reference/kernels reference/block_formats"

# ---- the text model -------------------------------------------------------------------------------------------------

TEXT = [
    Mistake(
        "per-layer rows of a table on disk land in the first 64",
        "float *to = out + (size_t)row * table->n_cols;",
        "float *to = out + (size_t)(row % 64) * table->n_cols;",
        f"many_positions {MODEL}",
    ),
    Mistake(
        "per-layer rows of a table on disk are those of the first 64 tokens",
        "table, tokens + row, n, f->config->ple_scale, to",
        "table, tokens + row % 64, n, f->config->ple_scale, to",
        f"many_positions {MODEL}",
    ),
    Mistake(
        "the per-layer projection is scaled by D", "f->ple, 1.0f / sqrtf((float)c->d_model)", "f->ple, 1.0f", SITES
    ),
    Mistake("both halves of the per-layer input count one half", "sqrtf(0.5f)", "0.5f", SITES),
    Mistake(
        "only as many per-layer slices as rows are normed",
        "w->ple_context_norm, n_slices, c->d_ple",
        "w->ple_context_norm, f->n_rows, c->d_ple",
        SITES,
    ),
    Mistake("no layer scalar", "*f->model->weights.layers[layer].layer_scalar, NULL", "1.0f, NULL", SITES),
    Mistake(
        "the gate is shown as the linear half",
        "TAP(MLP_PRE_LINEAR, layer, up);",
        "TAP(MLP_PRE_LINEAR, layer, gate);",
        SITES,
    ),
    Mistake(
        "no layer lets the positions of an image see each other",
        ".ends = ends ? ends + segment->first_row : NULL,",
        ".ends = ends && segment->n_rows < 0 ? ends : NULL,",
        MEDIA,
    ),
    Mistake(
        "values have the keys' gain",
        "G4_SITE_V_NORMED, v, NULL, lc->n_kv_heads)",
        "G4_SITE_V_NORMED, v, w->k_norm, lc->n_kv_heads)",
        SITES,
    ),
    Mistake(
        "edits of hook_result act in the first 16 rows",
        "for (int row = 0; row < f->n_rows; row++) {\n"
        "        const size_t offset = (size_t)row * (size_t)n_heads * (size_t)d;",
        "for (int row = 0; row < f->n_rows && row < 16; row++) {\n"
        "        const size_t offset = (size_t)row * (size_t)n_heads * (size_t)d;",
        "many_positions capture_api reference/exactness reference/reference_sites",
    ),
    Mistake(
        "an edit of hook_result in the second half of the rows is not noticed",
        "if (memcmp(before, result, n_bytes) == 0)",
        "if (memcmp(before, result, n_bytes / 2) == 0)",
        "many_positions capture_api reference/exactness reference/reference_sites",
    ),
    Mistake(
        "the method in `fast` depends on who looks", "return n ? n : segment->n_rows;", "return segment->n_rows;", FAST
    ),
    Mistake(
        "a batch's last softmax row is not capped",
        "g4_softcap_rows(&f->exec, logits, f->config->logit_softcap, n,",
        "g4_softcap_rows(&f->exec, logits, f->config->logit_softcap, n > 1 ? n - 1 : n,",
        SITES,
    ),
    Mistake(
        "cached keys are not shown in layers that compute no row",
        "if (layer > last_kv_layer && f->n_rows == 0 && !g4_taps_want_keys(f, layer))",
        "if (layer > last_kv_layer && f->n_rows == 0)",
        "capture_api many_positions",
    ),
    # pruning
    Mistake(
        "image ends do not follow pruned rows",
        "f->ends[to] = f->ends[from];",
        "(void)from;",
        f"{MEDIA} reference/media_hooks reference/exactness split_keys",
    ),
    Mistake(
        "logits slots do not follow pruned rows", "f->logits_slot[to] = f->logits_slot[from];", "(void)from;", EXACT
    ),
    Mistake(
        "captured rows do not follow pruned rows", "f->row_in_run[to] = f->row_in_run[from];", "(void)from;", EXACT
    ),
    Mistake(
        "sines do not follow pruned rows",
        "move_row(f->sine[r], (size_t)c->rope_half[r], to, from);",
        "(void)r;",
        EXACT,
    ),
    Mistake(
        "per-layer inputs do not follow pruned rows",
        "move_row(f->ple, (size_t)c->n_layers * (size_t)c->d_ple, to, from);",
        "(void)c;",
        EXACT,
    ),
    # experts
    Mistake(
        "of equal experts the last one wins",
        "probs[e] > probs[best]",
        "probs[e] >= probs[best]",
        f"capture_api {SITES}",
    ),
    Mistake(
        "expert weights are not normed",
        "weights[slot] / sum * per_expert_scale",
        "weights[slot] * per_expert_scale",
        SITES,
    ),
    Mistake("router inputs are not scaled", "x, 1.0f / sqrtf((float)c->d_model), NULL", "x, 1.0f, NULL", SITES),
]

# ---- taps, steps, the cache -----------------------------------------------------------------------------------------

STEPS = [
    Mistake(
        "hooks run in the opposite order",
        "for (int i = n_taps - 1; i >= 0; i--) {\n        int *first = &index->first[",
        "for (int i = 0; i < n_taps; i++) {\n        int *first = &index->first[",
        "capture_api api",
    ),
    Mistake(
        "a TAP on a copy: captures are right, edits change nothing",
        "    TAP(MLP_POST, layer, gate);\n",
        "    memcpy(up, gate, (size_t)f->n_rows * (size_t)width * sizeof *up);\n    TAP(MLP_POST, layer, up);\n",
        "edits",
    ),
    Mistake("later keys have score 0", "to[j] = unseen;", "to[j] = 0;", f"{EXACT} capture_api"),
    Mistake(
        "keys of a prompt are copied to every prompt of its length",
        "if (f->taps.taps[i].run != segment->run)",
        "if (f->runs[f->taps.taps[i].run].n_rows != f->runs[segment->run].n_rows)",
        f"many_positions capture_api {EXACT}",
    ),
    Mistake(
        "the first visible key is one too early",
        "segment->first_position - window + 1 : 0",
        "segment->first_position - window : 0",
        f"{EXACT} {SITES}",
    ),
    Mistake(
        "an edit does not keep its rows",
        "return tap->kind == G4_TAP_COPY || tap->kind == G4_TAP_CALL;",
        "return tap->kind == G4_TAP_COPY;",
        f"capture_api {EXACT}",
    ),
    Mistake(
        "a site after pruning says that it comes before",
        '"THh", QNORM,     AFTER,',
        '"THh", QNORM,     BEFORE,',
        "sites capture_api",
    ),
    Mistake(
        "pruning is not noticed",
        "    f->pruned = true;\n",
        "",
        "sites capture_api",
    ),
    Mistake(
        "a hook may resize its array",
        "    int failed = result ? check_face(edit, array, &face) : -1;",
        "    int failed = result ? 0 : -1;",
        "hook_arrays",
    ),
    Mistake(
        "chunks may cut an image before its last row",
        "row > 0 && ends[row - 1] > row;",
        "row > 0 && ends[row - 1] > row + 1;",
        f"{MEDIA} media_prompt",
    ),
    Mistake(
        "ends of a continued sequence count from its start",
        "f->ends[row] = s->start[r] + (run->ends ?",
        "f->ends[row] = (run->ends ?",
        MEDIA,
    ),
    Mistake(
        "runs with edits are cut into chunks",
        "take[r] = n_rows == 0 || left <= room ? left : 0;",
        "take[r] = left < room ? left : room;",
        f"capture_api {EXACT}",
    ),
    Mistake(
        "wanted rows are looked up one too far",
        "if (run->logits_rows[middle] < row)",
        "if (run->logits_rows[middle] <= row)",
        EXACT,
    ),
    Mistake(
        "the first id beyond the vocabulary is let in",
        "if (token < 0 || token >= n)",
        "if (token < 0 || token > n)",
        "bad_input api",
    ),
    Mistake(
        "a fork forgets what it has forgotten",
        "kv->n_slots, kv->first, kv->n_rotated};",
        "kv->n_slots, 0, kv->n_rotated};",
        f"many_positions {EXACT} api split_keys",
    ),
    Mistake(
        "the ring of a sliding layer is one slot short for long steps",
        "int64_t with_slack = (int64_t)window - 1 +",
        "int64_t with_slack = (int64_t)window - 2 +",
        "csrc",
    ),
    Mistake(
        "a step that stops early may overwrite the ring",
        "if (is_partial(s) || run->n_rows >",
        "if (run->n_rows >",
        "csrc",
    ),
    Mistake(
        "sequences grow by a step that starts late",
        "return s->options->stop_at_layer >= 0 || (s->n_runs && s->runs[0].resid);",
        "return s->options->stop_at_layer >= 0;",
        "run_from",
    ),
    Mistake(
        "each chunk starts from the first rows of the given stream",
        "resid + (size_t)f->row_in_run[segment->first_row] * d,",
        "resid,",
        "run_from",
    ),
    Mistake("sliding layers keep no slack", "(n_rows > window ? n_rows : window)", "n_rows", f"many_positions {EXACT}"),
    Mistake(
        "one too few positions to go back to",
        "kv->first + config->layers[layer].window - 1;",
        "kv->first + config->layers[layer].window;",
        f"many_positions {EXACT}",
    ),
    Mistake(
        "a saved window may lack a key",
        "length - first < window - 1)",
        "length - first < window - 2)",
        f"saved_sequences {EXACT} api bad_input",
    ),
    Mistake(
        "forks write into shared buffers",
        "kv->n_slots >= needed && g4_buffer_is_unique(kv->k) && g4_buffer_is_unique(kv->v)",
        "kv->n_slots >= needed",
        EXACT,
    ),
    Mistake(
        "a key is lost when keys become whole",
        "for (int p = kv->first; p < seq->length; p++)\n        g4_kv_whole_keys(",
        "for (int p = kv->first + 1; p < seq->length; p++)\n        g4_kv_whole_keys(",
        f"split_keys {EXACT}",
    ),
    Mistake(
        "an emptied sequence remembers a gap",
        "kv->first = 0;\n    if (kv->n_rotated",
        "if (kv->n_rotated",
        f"many_positions {EXACT}",
    ),
    Mistake(
        "values move as if the first one lay in slot 0",
        "copy_slot(to->v, p % to->n_slots, from->v, p % from->n_slots, slot_bytes(seq, layer));",
        "copy_slot(to->v, p % to->n_slots, from->v, (p - from->first) % from->n_slots, slot_bytes(seq, layer));",
        f"many_positions {EXACT}",
    ),
    Mistake(
        "exported keys begin at slot 0",
        "(size_t)(p % kv->n_slots) * n_bytes, target =",
        "(size_t)(p - kv->first) * n_bytes, target =",
        EXACT,
    ),
    Mistake(
        "keys and values without memory are not noticed",
        "return *buffer ? G4_OK : g4_fail_nomem(err, n_bytes);",
        "return G4_OK;",
        "csrc",
    ),
]

# ---- operations and kernels -----------------------------------------------------------------------------------------

OPS = [
    Mistake(
        "beyond 2048 columns the first ones' up is used",
        "ROW(o->out, i) + j, ROW(o->b, i) + j, n);",
        "ROW(o->out, i) + j, ROW(o->b, i), n);",
        f"{SITES}",
    ),
    Mistake(
        "angles turn back after 1024 positions",
        "(float)o->positions[i] * o->inv_freq[j]",
        "(float)(o->positions[i] & 1023) * o->inv_freq[j]",
        f"{MODEL} reference/oracle",
    ),
    Mistake(
        "norms forget eps",
        "float scale = sqrtf(exec->kernels->sum_squares(ROW(o->a, i), o->n) / (float)o->n + o->eps);",
        "float scale = sqrtf(exec->kernels->sum_squares(ROW(o->a, i), o->n) / (float)o->n);",
        SITES,
    ),
    Mistake(
        "only every other slice of logits is capped",
        "size_t start = (size_t)i * SOFTCAP_SLICE;",
        "size_t start = (size_t)(i / 2) * SOFTCAP_SLICE;",
        f"{SITES} {EXACT} load",
    ),
    Mistake("far-apart wanted rows have too little scratch", "p.max_span = a->n_keys;", "(void)a->n_keys;", "csrc"),
    Mistake(
        "spans do not count images",
        "most = max(most, a->ends[row] - g4_first_key(a, row));",
        "most = max(most, 0);",
        "csrc",
    ),
    Mistake(
        "keys that some queries do not see are mixed for all",
        "int common_end = min(end, g4_end_key(b->a, b->first_row));",
        "int common_end = min(end, g4_end_key(b->a, b->first_row + b->n - 1));",
        f"{EXACT} {SITES}",
    ),
    Mistake(
        "ring slots are read past their end",
        "return min(end - first, a->kv.n_slots - first % a->kv.n_slots);",
        "return end - first;",
        EXACT,
    ),
    Mistake(
        "small work wakes nobody, large neither",
        "if (small || n_tasks <= 1",
        "if (!small || n_tasks <= 1",
        "bench",
    ),
    Mistake(
        "convolutions beyond 4.5 s overwrite their first slice",
        "out + (size_t)t.first * (size_t)out_width * w->n_rows",
        "out + (size_t)(t.first % slice) * (size_t)out_width * w->n_rows",
        AUDIO,
    ),
    Mistake(
        "convolutions beyond 4.5 s read their first slice",
        "const int y = 2 * (t->first + row) - 1",
        "const int y = 2 * row - 1",
        AUDIO,
    ),
    Mistake("the depthwise convolution looks a frame ahead", "row - t->size + 1 + i;", "row - t->size + 2 + i;", AUDIO),
    Mistake("depthwise frames before the first are read", "if (source >= 0)", "if (source >= -1)", AUDIO),
    Mistake(
        "Q5_1 forgets its minimum",
        "i8_spread(b + 4, 16));\n    set_scale(v, f16_at(b), -f16_at(b + 2));",
        "i8_spread(b + 4, 16));\n    set_scale(v, f16_at(b), 0);",
        KERNELS,
    ),
    Mistake(
        "MXFP4's smallest exponents are equal",
        "exponent < 2 ? 0x00200000u << exponent",
        "exponent < 2 ? 0x00200000u",
        KERNELS,
    ),
    Mistake(
        "one value of IQ4's table is off",
        "iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,",
        "iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -11,",
        KERNELS,
    ),
]

# ---- encoders -------------------------------------------------------------------------------------------------------

ENCODERS = [
    Mistake(
        "distances of sound are off by one",
        "(float)(w->n_distances - 1 - i) * scale",
        "(float)(w->n_distances - i) * scale",
        AUDIO,
    ),
    Mistake("an odd last frame of sound is dropped", "return (n + 1) / 2;", "return n / 2;", AUDIO),
    Mistake(
        "layers of one lower bound share their clamped input",
        "linears[j]->input_min == linear->input_min && linears[j]->input_max == linear->input_max",
        "linears[j]->input_min == linear->input_min",
        f"{VISION} {AUDIO}",
    ),
    Mistake(
        "an image's angles are those of the first",
        "at += (size_t)image->n_rows * 2;",
        "at += 0 * (size_t)image->n_rows;",
        VISION,
    ),
    Mistake(
        "images of a batch begin at row 0",
        "row += (size_t)n;\n        if (in_steps)",
        "row += 0 * (size_t)n;\n        if (in_steps)",
        VISION,
    ),
    Mistake("the clipping of sound is one-sided", "-most, most, p->n_soft", "-FLT_MAX, most, p->n_soft", AUDIO),
    Mistake(
        "softplus of large scales",
        "softplus = x > 20 ? x : log1p(exp(x));",
        "softplus = x > 1 ? x : log1p(exp(x));",
        AUDIO,
    ),
]

# ---- the package ----------------------------------------------------------------------------------------------------

PACKAGE = [
    Mistake(
        "ShieldGemma's score is the probability of No",
        "logits[:, yes].astype(np.float64) - logits[:, no]",
        "logits[:, no].astype(np.float64) - logits[:, yes]",
        "guard",
    ),
    Mistake(
        "files may hold more layers than their configuration says",
        "if int(found[1]) >= config.n_layers:",
        "if int(found[1]) > config.n_layers:",
        "hostile_configs",
    ),
    Mistake(
        "strings of FunctionGemma's calls have no quotes",
        '    QUOTE: "<escape>",\n',
        "",
        "family_chat",
    ),
    Mistake(
        "a draw of exactly a block's border",
        "before + sums[b] > unit * total",
        "before + sums[b] >= unit * total",
        "picks",
    ),
    Mistake("a draw of exactly a border", "inside <= unit * total - before", "inside < unit * total - before", "picks"),
    Mistake(
        "repetition makes negative logits likelier",
        "np.where(values < 0, values * p.repetition_penalty",
        "np.where(values > 0, values * p.repetition_penalty",
        "sampling",
    ),
    Mistake(
        "equals are not ordered by id",
        "np.lexsort((found.ids, -found.values))",
        "np.lexsort((-found.ids, -found.values))",
        "sampling",
    ),
    Mistake("penalties count the prompt", "self._written.of(ids[n_prompt:])", "self._written.of(ids)", "sampling"),
    Mistake("a token's second penalty is its first", "self._counts[place] += 1", "self._counts[place] = 1", "sampling"),
    Mistake(
        "the bound of block maxima",
        "kth_largest(maxima, blocks, pick->k)",
        "kth_largest(maxima, blocks, 1)",
        "picks",
    ),
    Mistake("equals of the last logit are dropped", "n += value >= least;", "n += value > least;", "picks"),
    Mistake("the nucleus loses its tail", "(1 - share) * total / n", "(1 - share) * total", "picks"),
    Mistake("the nucleus forgets what weighs more", "        at->wanted -= sum;\n", "", "picks"),
    Mistake("a row's results are another's", "&run->picks[slot]", "&run->picks[0]", "picks"),
    Mistake(
        "of two stop strings the shorter one is found",
        "(text.find(s), -len(s), s)",
        "(text.find(s), len(s), s)",
        "sampling generate",
    ),
    Mistake(
        "all prompts of a batch draw the same numbers", "spawn_key=(stream,)", "spawn_key=(0,)", "sampling generate"
    ),
    Mistake(
        "the last layer may slide",
        "(*_layer_types(f, n_layers, 6)[:-1], FULL)",
        "tuple(_layer_types(f, n_layers, 6))",
        "config",
    ),
    Mistake("every layer has a double MLP", "width * (wide if source != i else 1)", "width * wide", "config"),
    Mistake("sliding layers have K = V, too", "tied and kind == FULL", "tied", "config"),
    Mistake(
        "every sixth layer begins with the first",
        "SLIDING if (i + 1) % period else FULL",
        "SLIDING if i % period else FULL",
        "config",
    ),
    Mistake(
        "unsorted positions come back sorted",
        "self.logits if self.logits is None or self.order is None else self.logits[self.order]",
        "self.logits",
        "api capture_api",
    ),
    Mistake("repeated positions", "(rows[1:] > rows[:-1]).all()", "(rows[1:] >= rows[:-1]).all()", "api capture_api"),
    Mistake(
        "hooks see positions of the step",
        "np.arange(self.before, self.before + len(self.prompt.ids))",
        "np.arange(len(self.prompt.ids))",
        "capture_api api",
    ),
    Mistake(
        "a step that failed is not recorded", "_record(plans)  # Ctrl-C keeps whole chunks", "pass", "bad_input api"
    ),
    Mistake(
        "a fork shares its list of tokens",
        "self._engine.fork(), self._tokens, self._keys)",
        "self._engine.fork(), [], [])",
        "api generate",
    ),
    Mistake(
        "the cache is reused one token too far",
        "self._keys[: len(keys) - 1]",
        "self._keys[: len(keys)]",
        "generate api",
    ),
    Mistake(
        "a saved sequence of another model is taken",
        'if meta.get("model") != fingerprint:',
        'if meta.get("model") is None:',
        "api bad_input",
    ),
    Mistake(
        "do_sample false draws",
        'if not take("do_sample", _as_boolean):',
        'if take("do_sample", _as_boolean) is None:',
        "options sampling generate",
    ),
    Mistake("<bos> is doubled", "return [self.bos_id, *ids[start:]]", "return [self.bos_id, *ids]", "tokenizer"),
    Mistake(
        "half a character is shown",
        'return self.flush() + piece.replace("▁", " ")',
        'return piece.replace("▁", " ")',
        "tokenizer",
    ),
    Mistake(
        "tall pictures get too many squares",
        "rows, cols = min(height // width, image_tokens), 1",
        "rows, cols = height // width, 1",
        "media_image",
    ),
    Mistake(
        "integer sound comes at half its level",
        "full = 2.0 ** (array.dtype.itemsize * 8 - 1)",
        "full = 2.0 ** (array.dtype.itemsize * 8)",
        "media_audio",
    ),
    Mistake(
        "sound of unsigned integers is taken as signed",
        'return (array - full) / full if array.dtype.kind == "u" else array / full',
        "return array / full",
        "media_audio",
    ),
    Mistake("16-bit sound in 64 bits is silence", "if peak < 1 << 15 and not", "if peak < 0 and not", "media_audio"),
    Mistake("a mirrored film is not mirrored", ":: -1 if a < 0 else 1]", "::1]", "media_video"),
    Mistake("films are sampled by index", "not _is_even(shown)", "False", "media_video"),
    Mistake(
        "one picture has one key at every budget",
        "_digest(image_tokens, pixels))",
        "_digest(0, pixels))",
        "media_prompt",
    ),
    Mistake(
        "playlists may open files", '"protocol_whitelist": ""', '"protocol_whitelist": "file,http,tcp"', "media_hostile"
    ),
    Mistake(
        "a part of an unknown type is passed over",
        "elif self.others and kind not in KNOWN_TYPES:",
        "elif kind not in KNOWN_TYPES:",
        "message_parts",
    ),
    Mistake("the mel window is symmetric", "np.hanning(FRAME + 1)[:-1]", "np.hanning(FRAME)", "media_audio"),
]

# ---- harvests -------------------------------------------------------------------------------------------------------

HARVEST = [
    Mistake(
        "harvest: the mean of merged rows leans to the later ones",
        "mean = self.mean + apart * (later.n / n)",
        "mean = self.mean + apart * 0.5",
        "harvest",
    ),
    Mistake(
        "harvest: a damaged shard of the right size passes",
        "if found.sha256 != wanted.sha256:",
        "if len(found.sha256) != len(wanted.sha256):",
        "harvest",
    ),
    Mistake(
        "harvest: a tensor's middle is not in the model's fingerprint",
        "digest.update(data[begin : begin + _CHUNK])",
        "digest.update(data[begin : begin + 64])",
        "harvest",
    ),
    Mistake(
        "harvest: documents are read on after the limit",
        "elif document.number == limit.document:",
        "else:",
        "harvest",
    ),
    Mistake(
        "harvest: a longer document goes on without BOS",
        "Piece(TokenizedPrompt(np.concatenate([bos, body[i : i + step]])), ",
        "Piece(TokenizedPrompt(np.concatenate([bos[i:], body[i : i + step]])), ",
        "harvest",
    ),
    Mistake(
        "harvest: sequences are numbered by shard",
        '        if self.name != "seq_id":',
        "        if True:",
        "harvest",
    ),
    Mistake(
        "harvest: a dead worker's shard is lost",
        "self._left.appendleft(shard)",
        "pass",
        "harvest",
    ),
    Mistake(
        "harvest: examples are in the order of their shards",
        "order = np.lexsort((rows, -values, ids))",
        "order = np.lexsort((rows, ids))",
        "harvest",
    ),
]

# ---- edits and experiments -----------------------------------------------------------------------------------------

EDITS = [
    Mistake(
        "a prompt takes rows of another in the order of its own",
        "index[ours - place.first] = np.searchsorted(rows, wanted)",
        "index[ours - place.first] = np.minimum(np.arange(len(ours)), len(rows) - 1)",
        "edits_of_batches",
    ),
    Mistake(
        "prompts of other lengths lend all that they have",
        "if len(ours) and same_length and here[-1] != there[-1]:",
        "if not len(ours) and same_length and here[-1] != there[-1]:",
        "edits_of_batches",
    ),
    Mistake(
        "a prompt that lends runs in its own place",
        "return list(TopologicalSorter(graph).static_order())",
        "return sorted(TopologicalSorter(graph).static_order())",
        "edits_of_batches",
    ),
    Mistake(
        "fewer forced experts than a token has are refused",
        "np.minimum(needed[rows], len(routing.forced))",
        "np.minimum(needed[rows], routing.top_k)",
        "edits",
    ),
    Mistake(
        "edits of an encoder are all of the first prompt",
        "place = Place(0, n, n, prompt=sequence)",
        "place = Place(0, n, n)",
        "edits_of_encoders",
    ),
    Mistake(
        "path patching holds the sender, too",
        "if order[other] > order[output]]",
        "if order[other] >= order[output]]",
        "paths",
    ),
    Mistake(
        "an expert's share passes the norm of the dense MLP",
        'post_feedforward_layernorm_2") / scale',
        'post_feedforward_layernorm_1") / scale',
        "paths",
    ),
    Mistake(
        "a patched expert keeps what it had",
        "new - old, pos=position",
        "new, pos=position",
        "paths",
    ),
    Mistake(
        "a crosscoder's features come too late for their own layer",
        "self.order[self.reads[layer].name] <= self.order",
        "self.order[self.reads[layer].name] < self.order",
        "layered_splice",
    ),
    Mistake(
        "the error of a later layer is that of the edited features",
        "[: 1 if self.clean is self.edited else 2]",
        "[:1]",
        "layered_splice",
    ),
    Mistake(
        "a key that a function unmasked does not count",
        "if (!is_masked(scores, first, end) || !is_masked(scores, 0, n_keys))",
        "if (!is_masked(scores, first, end))",
        "attention_to_nothing",
    ),
    Mistake(
        "rows of a harvest are not checked after they were read",
        "        self.check(shard)",
        "        pass",
        "harvest",
    ),
    Mistake(
        "documents that were left out are named by absolute paths",
        "return text.replace(here, there).replace(quoted, there)",
        "return text",
        "harvest_faults",
    ),
    Mistake(
        "features of variants are recorded",
        "hook.unrecorded() if isinstance(hook, Nested) else hook",
        "hook",
        "experiments",
    ),
    Mistake(
        "a run overtakes the one whose values it takes",
        "waits = s->options->in_order && take[r] < left;",
        "waits = false;",
        "csrc",
    ),
]

MISTAKES = [*TEXT, *STEPS, *OPS, *ENCODERS, *PACKAGE, *HARVEST, *EDITS]
