/* SPDX-License-Identifier: Apache-2.0 */
#include "model/model.h"

#include <stdlib.h>

#include "model/config.h"
#include "ops/blas.h"

/* Limit of the scratch kept between steps: fits a decode step and a 512-row chunk of the small models, not a huge
 * capture. */
static const size_t SCRATCH_KEPT = (size_t)128 << 20;

static g4_status init(g4_model *model, const g4_config *config, const g4_named_tensor *tensors, size_t n_tensors,
                      const g4_model_options *options, g4_error *err)
{
    G4_TRY(g4_config_check(config, err));
    G4_TRY(g4_config_copy(config, &model->config, err));
    G4_TRY(g4_kernels_select(&model->kernels, err));
    if (options->n_threads < 0 || options->n_threads > 1024)
        return g4_fail(err, G4_EVALUE, "threads = %d: expected 1 to 1024, or 0 for the default", options->n_threads);
    model->precision = options->precision;
    if (model->precision == G4_FAST)
        g4_blas_init();
    model->vectors = g4_arena_new();
    if (!model->vectors)
        return g4_fail_nomem(err, sizeof(void *));
    for (size_t i = 0; i < n_tensors; i++)
        G4_TRY(g4_guards_add(&model->guards, tensors[i].data, err));
    G4_TRY(g4_weights_bind(&model->weights, &model->config, tensors, n_tensors, model->vectors, err));
    G4_TRY(g4_guards_check(&model->guards, err));
    model->pool = g4_pool_new(options->n_threads ? options->n_threads : g4_cpu_count());
    return model->pool ? G4_OK : g4_fail_nomem(err, sizeof(void *));
}

g4_status g4_model_new(const g4_config *config, const g4_named_tensor *tensors, size_t n_tensors,
                       const g4_model_options *options, g4_model **result, g4_error *err)
{
    g4_model *model = calloc(1, sizeof *model);
    if (!model)
        return g4_fail_nomem(err, sizeof *model);
    g4_status status = init(model, config, tensors, n_tensors, options, err);
    if (status != G4_OK) {
        g4_model_free(model);
        return status;
    }
    *result = model;
    return G4_OK;
}

void g4_model_free(g4_model *model)
{
    if (!model)
        return;
    g4_pool_free(model->pool);
    g4_arena_free(model->vectors);
    g4_guards_release(&model->guards);
    g4_arena_free(atomic_load(&model->spare));
    g4_config_release(&model->config);
    free(model);
}

g4_arena *g4_model_take_scratch(g4_model *model)
{
    g4_arena *spare = atomic_exchange(&model->spare, NULL);
    return spare ? spare : g4_arena_new();
}

void g4_model_give_scratch(g4_model *model, g4_arena *scratch)
{
    g4_arena_trim(scratch, SCRATCH_KEPT);
    g4_arena_free(atomic_exchange(&model->spare, scratch));
}

const g4_config *g4_model_config(const g4_model *model)
{
    return &model->config;
}

const char *g4_model_isa(const g4_model *model)
{
    return g4_isa_name(model->kernels->isa);
}

int g4_model_threads(const g4_model *model)
{
    return g4_pool_size(model->pool);
}

g4_precision g4_model_precision(const g4_model *model)
{
    return model->precision;
}

size_t g4_model_weight_bytes(const g4_model *model)
{
    return model->weights.n_bytes;
}
