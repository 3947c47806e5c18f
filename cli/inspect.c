/* inspect.c - lapidary inspect: what a path holds. */
#include "cli/command.h"
#include "data/store.h"
#include "formats/adapter.h"
#include "formats/checkpoint.h"
#include "formats/file.h"
#include "formats/gguf_model.h"
#include "train/metrics.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *shape_text(const int64_t *shape, int ndim) {
    Text text = {0};
    text_adds(&text, "[");
    for (int i = 0; i < ndim; i++) text_addf(&text, "%s%" PRId64, i ? ", " : "", shape[i]);
    text_adds(&text, "]");
    return text.bytes;
}

static void add_tensor(json_t *list, const StoredTensor *t, const char *role) {
    json_t *shape = json_array();
    for (int d = 0; d < t->ndim; d++) json_array_append_new(shape, json_integer(t->shape[d]));
    json_array_append_new(list, json_pack("{s:s, s:s, s:o, s:s}", "name", t->name, "dtype",
                                          t->dtype_text, "shape", shape, "role", role));
}

static int64_t element_count(const StoredTensor *t) {
    int64_t n = 1;
    for (int d = 0; d < t->ndim; d++) n *= t->shape[d];
    return n;
}

static void finish(json_t *summary, json_t *tensors, bool as_json) {
    const char *key;
    json_t *value;
    size_t i;
    if (as_json) {
        if (tensors) json_object_set(summary, "tensors", tensors);
        Text line = {0};
        text_add_json(&line, summary);
        printf("%s\n", line.bytes);
        text_free(&line);
    } else {
        json_object_foreach(summary, key, value) {
            Text line = {0};
            if (json_is_string(value))
                text_adds(&line, json_string_value(value));
            else
                text_add_json(&line, value);
            printf("%-22s %s\n", key, line.bytes);
            text_free(&line);
        }
        json_array_foreach(tensors, i, value) {
            int64_t shape[8];
            int n = 0;
            size_t k;
            json_t *dim;
            json_array_foreach(json_object_get(value, "shape"), k, dim) shape[n++] =
                json_integer_value(dim);
            char *text = shape_text(shape, n);
            printf("  %-72s %-5s %-22s %s\n", json_string_value(json_object_get(value, "name")),
                   json_string_value(json_object_get(value, "dtype")), text,
                   json_string_value(json_object_get(value, "role")));
            free(text);
        }
    }
    json_decref(summary);
    json_decref(tensors);
}

static Status inspect_checkpoint(const char *path, bool as_json) {
    static const char *const roles[] = {"", "unused (shared K/V)", "tower", "tied", "derived"};
    Checkpoint c;
    TRY(checkpoint_open(&c, path));
    json_t *tensors = json_array();
    int64_t counts[sizeof roles / sizeof *roles] = {0}, table = 0;
    for (int i = 0; i < c.count; i++) {
        const StoredTensor *t = c.tensors[i].stored;
        counts[c.tensors[i].role] += element_count(t);
        if (strstr(t->name, "embed_tokens_per_layer")) table += element_count(t);
        add_tensor(tensors, t, roles[c.tensors[i].role]);
    }
    const ModelConfig *m = &c.config;
    json_t *summary = json_pack(
        "{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "kind",
        c.is_gguf ? "gguf" : "checkpoint", "path", path, "model_type", m->model_type, "layers",
        (json_int_t)m->num_hidden_layers, "hidden_size", (json_int_t)m->hidden_size, "vocab_size",
        (json_int_t)m->vocab_size, "tensor_count", (json_int_t)c.count, "text_parameters",
        (json_int_t)counts[ROLE_PARAM], "per_layer_table", (json_int_t)table, "tower_parameters",
        (json_int_t)counts[ROLE_TOWER], "unused_parameters", (json_int_t)counts[ROLE_DEAD]);
    finish(summary, tensors, as_json);
    checkpoint_close(&c);
    return OK;
}

static Status inspect_adapter(const char *path, bool as_json) {
    AdapterSpec spec;
    Safetensors file = {0};
    TRY(peft_load_spec(&spec, path));
    char *weights = path_join(path, "adapter_model.safetensors");
    Status status = safetensors_open(&file, weights);
    free(weights);
    if (status == OK) {
        json_t *tensors = json_array();
        int64_t total = 0;
        for (int i = 0; i < file.count; i++) {
            total += element_count(&file.tensors[i]);
            add_tensor(tensors, &file.tensors[i], "");
        }
        json_t *summary = json_pack(
            "{s:s, s:s, s:I, s:f, s:b, s:b, s:I, s:I}", "kind", "adapter", "path", path, "rank",
            (json_int_t)spec.rank, "alpha", spec.alpha, "rslora", spec.rslora, "dora", spec.dora,
            "tensor_count", (json_int_t)file.count, "parameters", (json_int_t)total);
        if (spec.base_model)
            json_object_set_new(summary, "base_model", json_string(spec.base_model));
        finish(summary, tensors, as_json);
    }
    safetensors_close(&file);
    adapter_spec_free(&spec);
    return status;
}

static Status inspect_store(const char *path, bool as_json) {
    Store s;
    char *template = NULL, *settings = NULL;
    TRY(store_open(&s, path, NULL, NULL, 0));
    Status status = h5_read_text(&s.file, "/", "template", &template);
    if (status == OK) status = h5_read_text(&s.file, "/", "settings", &settings);
    if (status == OK) {
        const StoreCounts *n = &s.counts;
        json_t *sources = json_array();
        for (int i = 0; i < s.source_count; i++)
            json_array_append_new(sources, json_string(s.source_paths[i]));
        int64_t soft = 0, bytes = 0;
        for (int64_t i = 0; i < s.media_count; i++)
            soft += s.media[i].tokens, bytes += s.media[i].part ? 0 : s.media[i].bytes;
        const char *kept = !s.media_count ? "none" : s.media[0].parts ? "original" : "features";
        finish(json_pack("{s:s, s:s, s:o, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:I, "
                         "s:I, s:s, s:I, s:I}",
                         "kind", "dataset", "path", path, "sources", sources, "template", template,
                         "settings", settings, "rows", (json_int_t)n->rows, "train_samples",
                         (json_int_t)s.train.count, "eval_samples", (json_int_t)s.eval.count, "cut",
                         (json_int_t)n->cut, "dropped", (json_int_t)n->dropped, "bad",
                         (json_int_t)n->bad, "tokens", (json_int_t)n->tokens, "trained_share",
                         n->tokens > 0 ? n->trained / n->tokens : 0.0, "media",
                         (json_int_t)s.media_count, "media_soft_tokens", (json_int_t)soft,
                         "media_kept", kept, "media_bytes", (json_int_t)bytes, "media_places",
                         (json_int_t)(s.train.slot_count + s.eval.slot_count)),
               NULL, as_json);
    }
    free(template);
    free(settings);
    store_close(&s);
    return status;
}

static Status inspect_run(const char *path, bool as_json) {
    char *csv = path_join(path, "metrics.csv");
    Metrics *rows = NULL;
    int64_t count = 0;
    double best = INFINITY;
    Status status = metrics_read(&rows, &count, csv);
    free(csv);
    TRY(status);
    for (int64_t i = 0; i < count; i++)
        if (rows[i].eval_loss < best) best = rows[i].eval_loss;
    json_t *summary = json_pack("{s:s, s:s, s:I}", "kind", "run", "path", path, "steps",
                                (json_int_t)(count ? rows[count - 1].step : 0));
    if (count) json_object_set_new(summary, "last_loss", json_real(rows[count - 1].loss));
    if (isfinite(best)) json_object_set_new(summary, "best_eval_loss", json_real(best));
    finish(summary, NULL, as_json);
    free(rows);
    return OK;
}

Status command_inspect(int argc, char **argv) {
    bool as_json = false;
    Option options[] = {{"--json", OPTION_FLAG, &as_json, "one JSON line"},
                        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "inspect PATH [--json]",
                   .about =
                       "Says what a checkpoint, GGUF, adapter, HDF5 dataset or run folder holds.",
                   .options = options,
                   .least = 1,
                   .most = 1};
    static const struct {
        const char *file;
        Status (*inspect)(const char *path, bool as_json);
    } kinds[] = {{"run.yaml", inspect_run},
                 {"adapter_config.json", inspect_adapter},
                 {"config.json", inspect_checkpoint}};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    const char *path = a.positional[0];
    if (!file_exists(path)) FAIL(ERR_IO, "%s: is not there", path);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char *inner = path_join(path, kinds[i].file);
        bool there = file_exists(inner);
        free(inner);
        if (there) return kinds[i].inspect(path, as_json);
    }
    if (gguf_is_model(path)) return inspect_checkpoint(path, as_json);
    size_t n = strlen(path);
    if (n > 3 && !strcmp(path + n - 3, ".h5")) return inspect_store(path, as_json);
    FAIL(ERR_FORMAT, "%s: is no checkpoint, GGUF, adapter, run folder or .h5 dataset", path);
}
