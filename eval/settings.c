/* settings.c - what a run's figures depend on, written beside them and compared when it goes on. */
#include "eval/questions.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/sha256.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void set_companion_hash(json_t *out, const char *key, const char *model, const char *name) {
    char *bytes = NULL, hash[65];
    size_t size;
    if (companion_find(&bytes, &size, model, name) == OK && bytes) {
        sha256_text(hash, bytes, size);
        json_object_set_new(out, key, json_string(hash));
    }
    free(bytes);
}

static json_t *number_or_null(double x) {
    return isnan(x) ? json_null() : json_real(x);
}

json_t *settings_of(const Run *r) {
    const EvalOptions *o = r->o;
    json_t *out = json_object(), *tasks = json_object(), *files = json_array();
    for (int i = 0; i < r->task_count; i++) {
        const Task *t = &r->tasks[i];
        json_object_set_new(tasks, t->name,
                            json_pack("{s:s, s:f, s:s*, s:I, s:I, s:b}", "rules", t->rules,
                                      "version", t->version, "question", t->question, "max_tokens",
                                      (json_int_t)(run_max_tokens(r, t)), "samples",
                                      (json_int_t)run_samples(r, t), "chat",
                                      prompt_is_chat(t, &o->prompt)));
        for (int k = 0; k < r->documents[i].file_count; k++) {
            const SourceFile *f = &r->documents[i].files[k];
            const char *slash = strrchr(f->path, '/');
            json_array_append_new(files, json_pack("{s:s, s:s, s:s, s:s?}", "task", t->name, "file",
                                                   slash ? slash + 1 : f->path, "sha256", f->sha256,
                                                   "release", f->release));
        }
    }
    json_object_set_new(out, "model", json_string(r->m->dir));
    json_object_set_new(out, "adapter", r->m->adapter ? json_string(r->m->adapter) : json_null());
    json_object_set_new(out, "dtype", json_string(dtype_name(r->m->g->dtype)));
    json_object_set_new(out, "weights",
                        json_string(dtype_name(r->m->g->linears.first->weight->value.dtype)));
    json_object_set_new(out, "kv", o->kv ? json_string(o->kv) : json_null());
    json_object_set_new(out, "tokenizer_sha256", json_string(tokenizer_hash(r->m->tokenizer)));
    set_companion_hash(out, "config_sha256", r->m->dir, "config.json");
    set_companion_hash(out, "chat_template_sha", r->m->dir, "chat_template.jinja");
    json_object_set_new(out, "chat", json_boolean(o->prompt.chat));
    json_object_set_new(out, "chat_format", json_string(chat_format_name(o->prompt.format)));
    json_object_set_new(out, "enable_thinking", json_boolean(o->prompt.think));
    json_object_set_new(out, "think_end", o->prompt.think ? json_string(THOUGHT_END) : json_null());
    json_object_set_new(out, "think_most", json_integer(o->think_most));
    json_object_set_new(out, "system_instruction",
                        o->prompt.system ? json_string(o->prompt.system) : json_null());
    json_object_set_new(out, "num_fewshot", json_integer(o->prompt.shots));
    json_object_set_new(out, "fewshot_seed", json_integer((json_int_t)o->prompt.seed));
    json_object_set_new(out, "limit", o->limit > 0 ? json_real(o->limit) : json_null());
    json_object_set_new(out, "temperature", number_or_null(o->temperature));
    json_object_set_new(out, "top_p", number_or_null(o->top_p));
    json_object_set_new(out, "min_p", number_or_null(o->min_p));
    json_object_set_new(out, "top_k", o->top_k >= 0 ? json_integer(o->top_k) : json_null());
    json_object_set_new(out, "model_sampling",
                        json_pack("{s:f, s:I, s:f}", "temperature", r->sampling.temperature,
                                  "top_k", (json_int_t)r->sampling.top_k, "top_p",
                                  r->sampling.top_p));
    json_object_set_new(out, "media_tokens",
                        json_pack("[I, I, I]", (json_int_t)o->reading.image_tokens,
                                  (json_int_t)o->reading.video_tokens,
                                  (json_int_t)o->reading.video_frames));
    json_object_set_new(out, "random_seed", json_integer((json_int_t)o->seed));
    json_object_set_new(out, "tasks", tasks);
    json_object_set_new(out, "data", files);
    return out;
}

Status settings_check(const Run *r, json_t *settings) {
    char *path = must_format("%s/settings.json", r->o->out), *bytes = NULL;
    size_t size;
    json_t *before = NULL;
    Status status = OK;
    if (file_exists(path)) {
        TRY_DONE(file_read(&bytes, &size, path, (size_t)64 << 20));
        TRY_DONE(json_read(&before, bytes, size, path));
        const char *key;
        json_t *value;
        json_object_foreach(settings, key,
                            value) if (!json_equal(value, json_object_get(before, key)))
            FAIL_DONE(ERR_CONFIG, "%s: holds a run with another '%s': give another --out",
                      r->o->out, key);
        goto done;
    }
    TRY_DONE(json_write(settings, path));
done:
    json_decref(before);
    free(bytes);
    free(path);
    return status;
}
