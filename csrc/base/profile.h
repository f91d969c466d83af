/* SPDX-License-Identifier: Apache-2.0 */
/* A step's time by operation: one row of totals each. The caller owns the profile and passes it to the step. */
#ifndef GEMMA4_BASE_PROFILE_H
#define GEMMA4_BASE_PROFILE_H

/* In forward order. Jobs that share one parallel region (k and v; gate and up) are one operation. */
/* clang-format off */
#define G4_EACH_OP(op)                          \
    op(OTHER,           "other")                \
    op(EMBED,           "embedding rows")       \
    op(ROPE_TABLE,      "rope table")           \
    op(PLE_TABLE,       "per-layer rows")       \
    op(PLE_CONTEXT,     "per-layer context")    \
    op(NORM,            "norm")                 \
    op(INPUT,           "input")                \
    op(QKV,             "q, k, v")              \
    op(KV,              "k, v")                 \
    op(Q,               "q")                    \
    op(ROPE,            "rope")                 \
    op(ATTEND_LOCAL,    "attention, local")     \
    op(ATTEND_GLOBAL,   "attention, global")    \
    op(O,               "o")                    \
    op(ADD,             "add")                  \
    op(GATE_UP,         "gate, up")             \
    op(GELU,            "gelu")                 \
    op(MUL,             "multiply")             \
    op(DOWN,            "down")                 \
    op(ROUTER,          "router")               \
    op(SOFTMAX,         "router softmax")       \
    op(EXPERTS_GATE_UP, "experts gate, up")     \
    op(EXPERTS_DOWN,    "experts down")         \
    op(PLE_GATE,        "per-layer gate")       \
    op(PLE_PROJECTION,  "per-layer projection") \
    op(CONV,            "light convolution")    \
    op(GLU,             "glu")                  \
    op(CLAMP,           "clamp")                \
    op(SCALE,           "scale")                \
    op(PROJECTION,      "projection")           \
    op(HEAD,            "head")                 \
    op(SOFTCAP,         "softcap")
/* clang-format on */

typedef enum {
#define G4_OP_ID(id, name) G4_OP_##id,
    G4_EACH_OP(G4_OP_ID)
#undef G4_OP_ID
        G4_N_OPS
} g4_op;

/* All double, so that Python sees one array. */
typedef struct {
    double calls, seconds;
    double work;      /* float32 arithmetic: a multiply-add counts as two, anything else as one */
    double int8_work; /* the same for integer matmuls */
    double bf16_work; /* and for bf16 matmuls */
    double bytes;     /* weights, cached keys and values, and arrays of rows, each read or written once */
} g4_op_total;

typedef struct {
    g4_op_total ops[G4_N_OPS];
} g4_profile;

#endif
