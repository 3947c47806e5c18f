/* rules.c - scorers, one after the other. */
#include "eval/rules.h"
#include "eval/bfcl.h"
#include "eval/ifeval.h"
#include "eval/math_answer.h"
#include "eval/regex.h"
#include "eval/template.h"
#include "infer/answer.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static Slice slice_text(const Text *t) {
    return (Slice){t->bytes ? t->bytes : "", t->size};
}

static json_t *string_of(Slice s) {
    json_t *string = json_stringn(s.bytes ? s.bytes : "", s.size);
    return string ? string : json_string("");
}

static void set_more(Verdict *v, const char *key, json_t *value) {
    if (!v->more) v->more = json_object();
    json_object_set_new(v->more, key, value);
}

static Slice first_response(const json_t *response) {
    return json_slice(json_is_array(response) ? json_array_get(response, 0) : response);
}

static Status target_of(Text *target, const Task *t, const json_t *doc) {
    TRY(template_render(target, t->answer ? t->answer : "{answer}", t, doc, NULL));
    return OK;
}

static Status score_exact(Verdict *v, const Task *t, const FilterChain *chain, const json_t *doc,
                          const json_t *response) {
    Text target = {0}, answer = filter_chain_apply(chain, doc, response);
    const json_t *list = t->answer ? NULL : document_field(t, doc, "answer", 6), *one;
    bool right = false;
    size_t i;
    Status status = json_is_array(list) ? OK : target_of(&target, t, doc);
    json_array_foreach(list, i, one) right |=
        exact_match(&t->exact, slice_text(&answer), json_slice(one)); /* any of them is right */
    if (status == OK) {
        if (!json_is_array(list))
            right = exact_match(&t->exact, slice_text(&answer), slice_text(&target));
        v->parsed = !slice_is(slice_text(&answer), "[invalid]");
        v->extracted = string_of(slice_text(&answer));
        v->score = json_real(right);
    }
    text_free(&target);
    text_free(&answer);
    return status;
}

/* ---- word errors ---- */

typedef struct Words {
    Text text; /* lower case, without ASCII punctuation but for apostrophes, words by one space */
    Slice *items;
    int64_t count;
} Words;

static Words words_of(Slice s) {
    Words w = {0};
    Text lower = {0};
    text_add_lower(&lower, s);
    for (size_t i = 0; i < lower.size; i++) {
        unsigned char c = (unsigned char)lower.bytes[i];
        if (i + 2 < lower.size && !memcmp(lower.bytes + i, "\xe2\x80\x99", 3)) {
            text_adds(&w.text, "'"); /* the typographic apostrophe */
            i += 2;
        } else if (c == '\'' || !ispunct(c)) {
            text_add(&w.text, isspace(c) ? " " : lower.bytes + i, 1);
        }
    }
    text_free(&lower);
    w.items = must_malloc((w.text.size / 2 + 1) * sizeof *w.items);
    for (size_t at = 0; at < w.text.size;) {
        size_t end = at;
        while (end < w.text.size && w.text.bytes[end] != ' ') end++;
        if (end > at) w.items[w.count++] = (Slice){w.text.bytes + at, end - at};
        at = end + 1;
    }
    return w;
}

static void words_free(Words *w) {
    text_free(&w->text);
    free(w->items);
}

/* Least insertions, deletions and replacements that make b of a (Levenshtein 1966). */
static int64_t word_distance(const Words *a, const Words *b) {
    int64_t *row = must_malloc((size_t)(b->count + 1) * sizeof *row);
    for (int64_t k = 0; k <= b->count; k++) row[k] = k;
    for (int64_t i = 0; i < a->count; i++) {
        int64_t corner = row[0];
        row[0] = i + 1;
        for (int64_t k = 0; k < b->count; k++) {
            Slice x = a->items[i], y = b->items[k];
            int64_t best = corner + !(x.size == y.size && !memcmp(x.bytes, y.bytes, x.size));
            corner = row[k + 1];
            if (row[k] + 1 < best) best = row[k] + 1;
            if (corner + 1 < best) best = corner + 1;
            row[k + 1] = best;
        }
    }
    int64_t distance = row[b->count];
    free(row);
    return distance;
}

static Status score_words(Verdict *v, const Task *t, const FilterChain *chain, const json_t *doc,
                          const json_t *response) {
    Text target = {0}, answer = filter_chain_apply(chain, doc, response);
    Status status = target_of(&target, t, doc);
    Words said = words_of(slice_text(&answer)), meant = words_of(slice_text(&target));
    if (status == OK && !meant.count)
        status = status_fail(ERR_FORMAT, "the transcript has no words to compare with");
    if (status == OK) {
        int64_t errors = word_distance(&said, &meant);
        v->parsed = said.count > 0;
        v->extracted = string_of(slice_text(&said.text));
        v->score = json_real((double)errors / (double)meant.count);
        set_more(v, "errors", json_integer(errors));
        set_more(v, "words", json_integer(meant.count));
    }
    words_free(&said);
    words_free(&meant);
    text_free(&target);
    text_free(&answer);
    return status;
}

static Status score_math(Verdict *v, const Task *t, const json_t *doc, const json_t *response) {
    Slice text = first_response(response), answer = between_dollars(text), boxed;
    Text target = {0};
    bool odd;
    TRY(target_of(&target, t, doc));
    if (t->scorer == SCORER_AIME && last_boxed(text, &boxed)) answer = boxed;
    v->parsed = answer.bytes != text.bytes || answer.size != text.size;
    v->extracted = string_of(answer);
    Text normal = math_normal(answer, &odd);
    set_more(v, "normalized", string_of(slice_text(&normal)));
    v->score = json_real(math_equal(answer, slice_text(&target)));
    text_free(&normal);
    text_free(&target);
    return OK;
}

static Status score_minerva(Verdict *v, const Task *t, const json_t *doc, const json_t *response) {
    Slice text = first_response(response), answer = minerva_answer(text);
    Text gold = {0};
    TRY(target_of(&gold, t, doc));
    Text normal = minerva_normal(answer), target = minerva_normal(slice_text(&gold));
    v->parsed = !slice_is(answer, "[invalidanswer]");
    v->extracted = string_of(answer);
    v->score = json_real(minerva_equal(slice_text(&normal), slice_text(&target)));
    set_more(v, "normalized", string_of(slice_text(&normal)));
    set_more(v, "math_verify",
             json_real(math_verified(json_slice(json_object_get(doc, "solution")), text)));
    text_free(&gold);
    text_free(&normal);
    text_free(&target);
    return OK;
}

static Status score_matharena(Verdict *v, const Task *t, const json_t *doc,
                              const json_t *response) {
    Text target = {0};
    double value, gold;
    int warning;
    TRY(target_of(&target, t, doc));
    gold = strtod(target.bytes, NULL);
    v->parsed = matharena_answer(first_response(response), &value, &warning);
    if (v->parsed) {
        Text shown = {0};
        if (fabs(value - round(value)) < 1e-10 && fabs(value) < 1e15)
            text_addf(&shown, "%.0f", round(value));
        else
            text_add_real(&shown, value);
        v->extracted = string_of(slice_text(&shown));
        text_free(&shown);
    } else {
        v->extracted = json_null();
    }
    set_more(v, "warning", json_integer(warning));
    v->score = json_real(v->parsed && fabs(value - gold) <= 1e-10 * fmax(1, fabs(gold)));
    text_free(&target);
    return OK;
}

/* The last group of the first match. */
static bool first_group(Slice text, const char *pattern, bool last, Slice *group) {
    Regex *r = regex_get(pattern, 0);
    size_t from = 0;
    Match m;
    bool found = false;
    while ((!found || last) && regex_next(r, text, &from, &m))
        *group = m.count ? m.groups[0] : m.whole, found = true;
    regex_close(r);
    return found;
}

static Status score_letter(Verdict *v, const Task *t, const json_t *doc, const json_t *response) {
    static const char *const steps[] = {"answer is \\(?([A-J])\\)?", ".*[aA]nswer:\\s*([A-J])",
                                        "\\b[A-J]\\b"};
    Slice text = first_response(response), letter = {NULL, 0};
    Text target = {0};
    int step = 0;
    TRY(target_of(&target, t, doc));
    if (t->scorer == SCORER_LETTER)
        v->parsed = first_group(text, "(?i)Answer[ \\t]*:[ \\t]*\\$?([A-D])\\$?", false, &letter);
    for (; t->scorer == SCORER_THREE_STEP && step < 3 && !v->parsed; step++)
        v->parsed = first_group(text, steps[step], step == 2, &letter);
    Text upper = {0};
    text_add_upper(&upper, letter);
    v->extracted = v->parsed ? string_of(slice_text(&upper)) : json_null();
    if (t->scorer == SCORER_THREE_STEP)
        set_more(v, "step", v->parsed ? json_integer(step) : json_null());
    Slice gold = slice_text(&target);
    if (gold.size == 3 && *gold.bytes == '(') gold = (Slice){gold.bytes + 1, 1};
    if (!v->parsed && t->scorer == SCORER_THREE_STEP)
        v->score = json_string("random");
    else
        v->score = json_real(v->parsed && gold.size == 1 && *upper.bytes == *gold.bytes);
    text_free(&upper);
    text_free(&target);
    return OK;
}

static Status score_ifeval(Verdict *v, const json_t *doc, const json_t *response) {
    v->extracted = json_null();
    v->parsed = true;
    return ifeval_score(&v->score, doc, first_response(response));
}

/* The program only: running it is another's business (sandbox.h). */
static Status score_python(Verdict *v, const Task *t, const FilterChain *chain, const json_t *doc,
                           const json_t *response) {
    Slice text = first_response(response);
    Text program = {0};
    json_t *more = json_pack("{s:o}", "response", string_of(text));
    /* What the harness calls extracted is the code alone where its filter cuts code out. */
    const char *shown = !strcmp(chain->name, "extract_code") ? "{response|fenced}" : t->program;
    Status status = template_render(&program, shown, t, doc, more);
    json_decref(more);
    v->parsed = program.size > 0;
    v->extracted = string_of(slice_text(&program));
    v->score = json_null();
    text_free(&program);
    return status;
}

/* The calls of an answer, against those that are accepted. */
static void score_calls(Verdict *v, const json_t *doc, const json_t *response) {
    /* Types count, so nothing is cast to what the declarations say. */
    json_t *message = answer_parse((Slice){"", 0}, first_response(response), NULL),
           *calls = json_array(), *call;
    size_t i;
    json_array_foreach(json_object_get(message, "tool_calls"), i, call) {
        const json_t *function = json_object_get(call, "function");
        json_t *one = json_object();
        json_object_set(one, json_string_value(json_object_get(function, "name")),
                        json_object_get(function, "arguments"));
        json_array_append_new(calls, one);
    }
    v->parsed = !json_object_get(message, "bad_calls");
    v->score = json_real(bfcl_accepts(calls, json_object_get(doc, "ground_truth"),
                                      json_object_get(doc, "function")));
    v->extracted = calls;
    json_decref(message);
}

static Status score_cleanup(Verdict *v, const json_t *doc, const json_t *response) {
    Texts until = {0};
    const json_t *list = json_object_get(doc, "until"), *end = json_object_get(doc, "think_end");
    until.items = must_calloc(json_array_size(list) + 1, sizeof *until.items);
    for (size_t i = 0; i < json_array_size(list); i++)
        if (json_is_string(json_array_get(list, i)))
            until.items[until.count++] = (char *)json_string_value(json_array_get(list, i));
    Text text = response_cleaned(first_response(response), &until, json_string_value(end));
    v->extracted = string_of(slice_text(&text));
    v->score = json_null();
    v->parsed = true;
    text_free(&text);
    free(until.items);
    return OK;
}

Status rule_score(Verdict *v, const Task *t, const FilterChain *chain, const json_t *doc,
                  const json_t *response) {
    *v = (Verdict){0};
    switch (t->scorer) {
    case SCORER_EXACT:
        return score_exact(v, t, chain, doc, response);
    case SCORER_HENDRYCKS:
    case SCORER_AIME:
        return score_math(v, t, doc, response);
    case SCORER_MINERVA:
        return score_minerva(v, t, doc, response);
    case SCORER_MATHARENA:
        return score_matharena(v, t, doc, response);
    case SCORER_THREE_STEP:
    case SCORER_LETTER:
        return score_letter(v, t, doc, response);
    case SCORER_IFEVAL:
        return score_ifeval(v, doc, response);
    case SCORER_PYTHON:
        return score_python(v, t, chain, doc, response);
    case SCORER_BFCL:
        score_calls(v, doc, response);
        return OK;
    case SCORER_WER:
        return score_words(v, t, chain, doc, response);
    case SCORER_CLEANUP:
        return score_cleanup(v, doc, response);
    default:
        FAIL(ERR_CONFIG, "task '%s' is not scored by its responses", t->name);
    }
}

void verdict_free(Verdict *v) {
    json_decref(v->extracted);
    json_decref(v->score);
    json_decref(v->more);
    *v = (Verdict){0};
}

bool rule_is_rate(const Task *task) {
    return task->scorer == SCORER_WER;
}

const char *rule_metric(const Task *task) {
    switch (task->scorer) {
    case SCORER_NONE:
    case SCORER_BFCL:
        return "acc";
    case SCORER_PYTHON:
        return "pass@1";
    case SCORER_WER:
        return "wer";
    default:
        return "exact_match";
    }
}

Text response_cleaned(Slice raw, const Texts *until, const char *think_end) {
    size_t n = think_end ? strlen(think_end) : 0, at;
    bool thought = false;
    while (n && (at = slice_find(raw, think_end, 0)) < raw.size) {
        raw = (Slice){raw.bytes + at + n, raw.size - at - n};
        thought = true;
    }
    if (thought) { /* white space in front goes */
        Slice stripped = slice_strip(raw);
        raw = (Slice){stripped.bytes, (size_t)(raw.bytes + raw.size - stripped.bytes)};
    }
    for (int i = 0; i < until->count; i++)
        if (*until->items[i]) raw.size = slice_find(raw, until->items[i], 0);
    Text out = {0};
    text_add(&out, raw.bytes ? raw.bytes : "", raw.size);
    return out;
}
