/* ifeval.c - the checks, one function a family; variants and figures at the end.
 *
 * Two checks have no exact counterpart in C and are near: sentences are counted by their closing
 * marks (the harness has a trained splitter), and languages are told by script and common words. */
#include "eval/ifeval.h"
#include "eval/regex.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct Check {
    Slice text;
    const json_t *arguments, *doc;
} Check;

static Slice slice_text(const Text *t) {
    return (Slice){t->bytes ? t->bytes : "", t->size};
}

static Slice argument(const Check *c, const char *name) {
    return json_slice(json_object_get(c->arguments, name));
}

static int64_t count_argument(const Check *c, const char *name) {
    const json_t *value = json_object_get(c->arguments, name);
    return json_is_real(value) ? (int64_t)json_real_value(value) : json_integer_value(value);
}

/* "less than" or "at least" a threshold. */
static bool compare(const Check *c, int64_t n, const char *relation, const char *threshold) {
    int64_t limit = count_argument(c, threshold);
    return slice_is(argument(c, relation), "less than") ? n < limit : n >= limit;
}

static Text lower(Slice s) {
    Text t = {0};
    text_add(&t, "", 0);
    text_add_lower(&t, s);
    return t;
}

/* The next piece of a text split at a separator; at the end false. */
static bool next_piece(Slice s, const char *separator, size_t *at, Slice *piece) {
    if (*at > s.size) return false;
    size_t end = slice_find(s, separator, *at);
    *piece = (Slice){s.bytes + *at, end - *at};
    *at = end == s.size ? s.size + 1 : end + strlen(separator);
    return true;
}

/* How often a pattern from the data is found; a pattern that is none counts as its plain text. */
static int64_t pattern_count(Slice text, Slice pattern, const char *around) {
    Text whole = {0};
    Regex *r;
    int64_t n = 0;
    text_adds(&whole, around);
    text_add(&whole, pattern.bytes, pattern.size);
    text_adds(&whole, around);
    if (regex_open(&r, whole.bytes, REGEX_IGNORE_CASE) == OK) {
        size_t from = 0;
        Match m;
        while (regex_next(r, text, &from, &m)) n++;
        regex_close(r);
    } else {
        for (size_t at = 0; (at = slice_find(text, whole.bytes, at)) < text.size; at++) n++;
    }
    text_free(&whole);
    return n;
}

/* ---- keywords ---- */

static bool keywords_existence(const Check *c) {
    size_t i;
    json_t *word;
    json_array_foreach(json_object_get(c->arguments, "keywords"), i,
                       word) if (!pattern_count(c->text, json_slice(word), "")) return false;
    return true;
}

static bool keywords_frequency(const Check *c) {
    int64_t n = pattern_count(c->text, slice_strip(argument(c, "keyword")), "");
    return compare(c, n, "relation", "frequency");
}

static bool forbidden_words(const Check *c) {
    size_t i;
    json_t *word;
    json_array_foreach(json_object_get(c->arguments, "forbidden_words"), i,
                       word) if (pattern_count(c->text, json_slice(word), "\\b")) return false;
    return true;
}

static bool letter_frequency(const Check *c) {
    Text text = lower(c->text), letter = lower(slice_strip(argument(c, "letter")));
    int64_t n = 0;
    for (size_t at = 0; letter.size; at += letter.size, n++)
        if ((at = slice_find(slice_text(&text), letter.bytes, at)) == text.size) break;
    text_free(&text);
    text_free(&letter);
    return compare(c, n, "let_relation", "let_frequency");
}

/* ---- language ---- */

const char *language_of(Slice text) {
    static const struct {
        uint32_t first, last;
        const char *code;
    } scripts[] = {{0x0370, 0x03ff, "el"},   {0x0400, 0x04ff, "ru"}, {0x0590, 0x05ff, "he"},
                   {0x0600, 0x06ff, "ar"},   {0x0900, 0x097f, "hi"}, {0x0980, 0x09ff, "bn"},
                   {0x0a00, 0x0a7f, "pa"},   {0x0a80, 0x0aff, "gu"}, {0x0b80, 0x0bff, "ta"},
                   {0x0c00, 0x0c7f, "te"},   {0x0c80, 0x0cff, "kn"}, {0x0d00, 0x0d7f, "ml"},
                   {0x0e00, 0x0e7f, "th"},   {0x3040, 0x30ff, "ja"}, {0xac00, 0xd7af, "ko"},
                   {0x4e00, 0x9fff, "zh-cn"}};
    static const struct {
        const char *code, *words;
    } latin[] = {
        {"en",
         "the of and to in is that it for was with as on be this are not or an you from at by "
         "have what a which your but they we can will his her my i"},
        {"de", "der die und das ist nicht ein eine zu den mit von im auf sich es auch dem als wird "
               "ich für an werden bei nach wie"},
        {"fr", "le la les des et est un une que qui dans pour pas sur au avec ce il elle du en je "
               "vous nous sont par plus"},
        {"es", "el la los las que de y en un una es por con para no se su lo como más al del son "
               "muy pero está"},
        {"it", "il la che di e un una per non con sono del della i le da in si come anche questo "
               "più alla gli è"},
        {"pt", "o a os as que de e um uma para não com em do da no na por mais se são como ao dos "
               "está você"},
        {"fi", "ja on ei että se hän mutta oli ovat kun myös tai kuin joka voi tämä sen olla"},
        {"sw", "na ya wa kwa ni katika za la kuwa hii cha hiyo watu sana au kama pia yake"},
        {"vi", "và của là có một những các cho không trong được với người này để khi đã"},
        {"nl", "de het een en van is dat niet in op te zijn met voor die aan ook er maar"},
        {"tr", "ve bir bu da de için ile çok olarak daha gibi olan ne ama"},
        {"pl", "i w na nie się z do jest że to jak o po ale od dla przez"}};
    int64_t counts[sizeof scripts / sizeof *scripts] = {0}, letters = 0, urdu = 0, persian = 0;
    int64_t marathi = 0, bulgarian = 0, best = 0;
    uint32_t point;
    for (size_t i = 0; i < text.size;) {
        int size = utf8_next(text.bytes + i, text.size - i, &point);
        if (!size) size = 1, point = 0;
        letters += (point >= 'a' && point <= 'z') || (point >= 'A' && point <= 'Z') ||
                   (point >= 0xc0 && point < 0x250) || (point >= 0x1e00 && point < 0x1f00);
        for (size_t k = 0; k < sizeof scripts / sizeof *scripts; k++)
            counts[k] += point >= scripts[k].first && point <= scripts[k].last;
        urdu += point == 0x679 || point == 0x688 || point == 0x691 || point == 0x6d2;
        persian += point == 0x6cc || point == 0x6a9 || point == 0x67e || point == 0x686;
        marathi += point == 0x0933;                      /* the letter that Hindi lacks */
        bulgarian += point == 0x044b || point == 0x044d; /* letters that Bulgarian lacks */
        i += (size_t)size;
    }
    for (size_t k = 1; k < sizeof scripts / sizeof *scripts; k++)
        if (counts[k] > counts[best]) best = (int64_t)k;
    if (counts[best] > letters) {
        const char *code = scripts[best].code;
        if (!strcmp(code, "ar")) return urdu ? "ur" : persian ? "fa" : "ar";
        if (!strcmp(code, "hi") && marathi) return "mr";
        if (!strcmp(code, "ru") && !bulgarian && counts[best] > 40) return "bg";
        if (counts[13]) return "ja"; /* kana among Chinese characters */
        return code;
    }
    Text words = lower(text);
    int64_t most = 0, found = -1;
    for (size_t k = 0; k < sizeof latin / sizeof *latin; k++) {
        Text pattern = {0};
        text_adds(&pattern, "\\b(?:");
        for (const char *w = latin[k].words; *w; w++) text_add(&pattern, *w == ' ' ? "|" : w, 1);
        text_adds(&pattern, ")\\b");
        int64_t n = text_count(slice_text(&words), pattern.bytes, 0);
        if (n > most) most = n, found = (int64_t)k;
        text_free(&pattern);
    }
    text_free(&words);
    return found < 0 ? letters ? "en" : "" : latin[found].code;
}

static bool response_language(const Check *c) {
    const char *language = language_of(c->text);
    return !*language || slice_is(argument(c, "language"), language);
}

/* Whether every letter that has a case has this one, and there is one. */
static bool all_of_case(Slice s, bool upper) {
    Text same = {0}, other = {0};
    text_add_lower(&same, s);
    text_add_upper(&other, s);
    const Text *kept = upper ? &other : &same, *changed = upper ? &same : &other;
    bool all = kept->size == s.size && !memcmp(kept->bytes ? kept->bytes : "", s.bytes, s.size) &&
               !(changed->size == s.size &&
                 !memcmp(changed->bytes ? changed->bytes : "", s.bytes, s.size));
    text_free(&same);
    text_free(&other);
    return all;
}

static bool english_capital(const Check *c) {
    return all_of_case(c->text, true) && !strcmp(language_of(c->text), "en");
}

static bool english_lowercase(const Check *c) {
    return all_of_case(c->text, false) && !strcmp(language_of(c->text), "en");
}

static bool capital_words(const Check *c) {
    Regex *r = regex_get("[\\w'&-]+", 0);
    size_t from = 0;
    Match m;
    int64_t n = 0;
    while (regex_next(r, c->text, &from, &m)) n += all_of_case(m.whole, true);
    regex_close(r);
    return compare(c, n, "capital_relation", "capital_frequency");
}

/* ---- length ---- */

static bool number_sentences(const Check *c) {
    int64_t n = text_count(slice_strip(c->text),
                           "(?<!\\bMr)(?<!\\bMrs)(?<!\\bDr)(?<!\\bMs)(?<!\\be\\.g)(?<!\\bi\\.e)"
                           "[.!?]+[\"')\\]]*(?=\\s|\\z)",
                           0);
    Slice s = slice_strip(c->text);
    if (s.size && !text_has(s, "[.!?][\"')\\]]*\\z", 0)) n++;
    return compare(c, n, "relation", "num_sentences");
}

static bool number_words(const Check *c) {
    return compare(c, text_count(c->text, "\\w+", 0), "relation", "num_words");
}

static bool number_paragraphs(const Check *c) {
    Regex *r = regex_get("\\s?\\*\\*\\*\\s?", 0);
    size_t from = 0, done = 0;
    Match m;
    int64_t pieces = 0, empty_inside = 0, empty_ends = 0;
    for (bool more = true; more; pieces++) {
        more = regex_next(r, c->text, &from, &m);
        size_t end = more ? (size_t)(m.whole.bytes - c->text.bytes) : c->text.size;
        if (!slice_strip((Slice){c->text.bytes + done, end - done}).size) {
            if (pieces == 0 || !more)
                empty_ends++;
            else
                empty_inside++;
        }
        done = end + (more ? m.whole.size : 0);
    }
    regex_close(r);
    return !empty_inside && pieces - empty_ends == count_argument(c, "num_paragraphs");
}

static bool nth_paragraph(const Check *c) {
    int64_t nth = count_argument(c, "nth_paragraph"), pieces = 0, empty = 0;
    size_t at = 0;
    Slice piece, wanted = {NULL, 0};
    for (; next_piece(c->text, "\n\n", &at, &piece); pieces++) {
        empty += !slice_strip(piece).size;
        if (pieces + 1 == nth) wanted = slice_strip(piece);
    }
    if (nth < 1 || nth > pieces - empty || !wanted.size) return false;
    size_t end = 0;
    while (end < wanted.size && slice_strip((Slice){wanted.bytes + end, 1}).size) end++;
    Slice word = {wanted.bytes, end};
    while (word.size && *word.bytes == '\'') word.bytes++, word.size--;
    while (word.size && *word.bytes == '"') word.bytes++, word.size--;
    for (size_t i = 0; i < word.size; i++)
        if (strchr(".,?!'\"", word.bytes[i])) word.size = i;
    Text mine = lower(word), expected = lower(argument(c, "first_word"));
    bool same = mine.size == expected.size && !memcmp(mine.bytes, expected.bytes, mine.size);
    text_free(&mine);
    text_free(&expected);
    return same && pieces - empty == count_argument(c, "num_paragraphs");
}

/* ---- content and format ---- */

static bool placeholders(const Check *c) {
    return text_count(c->text, "\\[.*?\\]", 0) >= count_argument(c, "num_placeholders");
}

static bool postscript(const Check *c) {
    Text text = lower(c->text), pattern = {0};
    Slice marker = slice_strip(argument(c, "postscript_marker"));
    if (slice_is(marker, "P.P.S")) {
        text_adds(&pattern, "\\s*p\\.\\s?p\\.\\s?s.*$");
    } else if (slice_is(marker, "P.S.")) {
        text_adds(&pattern, "\\s*p\\.\\s?s\\..*$");
    } else {
        text_adds(&pattern, "\\s*");
        text_add_lower(&pattern, marker);
        text_adds(&pattern, ".*$");
    }
    Regex *r;
    bool found = regex_open(&r, pattern.bytes, REGEX_MULTILINE) == OK;
    if (found) {
        found = regex_found(r, slice_text(&text));
        regex_close(r);
    }
    text_free(&text);
    text_free(&pattern);
    return found;
}

static bool bullet_lists(const Check *c) {
    int64_t n = text_count(c->text, "^\\s*\\*[^\\*].*$", REGEX_MULTILINE) +
                text_count(c->text, "^\\s*-.*$", REGEX_MULTILINE);
    return n == count_argument(c, "num_bullets");
}

static bool constrained_response(const Check *c) {
    static const char *const answers[] = {"My answer is yes.", "My answer is no.",
                                          "My answer is maybe."};
    for (int i = 0; i < 3; i++)
        if (slice_find(c->text, answers[i], 0) < c->text.size) return true;
    return false;
}

static int64_t count_not_blank(Slice text, const char *pattern, const char *marks) {
    Regex *r = regex_get(pattern, 0);
    size_t from = 0;
    Match m;
    int64_t n = 0;
    while (regex_next(r, text, &from, &m)) {
        Slice s = m.whole;
        while (s.size && strchr(marks, *s.bytes)) s.bytes++, s.size--;
        while (s.size && strchr(marks, s.bytes[s.size - 1])) s.size--;
        n += slice_strip(s).size > 0;
    }
    regex_close(r);
    return n;
}

static bool highlights(const Check *c) {
    int64_t n = count_not_blank(c->text, "\\*[^\\n\\*]*\\*", "*") +
                count_not_blank(c->text, "\\*\\*[^\\n\\*]*\\*\\*", "*");
    return n >= count_argument(c, "num_highlights");
}

static bool sections(const Check *c) {
    Text pattern = {0};
    Slice mark = slice_strip(argument(c, "section_spliter"));
    Regex *r;
    int64_t n = 0;
    text_adds(&pattern, "\\s?");
    text_add(&pattern, mark.bytes, mark.size);
    text_adds(&pattern, "\\s?\\d+\\s?");
    if (regex_open(&r, pattern.bytes, 0) == OK) {
        size_t from = 0;
        Match m;
        while (regex_next(r, c->text, &from, &m)) n++;
        regex_close(r);
    }
    text_free(&pattern);
    return n >= count_argument(c, "num_sections");
}

static Slice without_prefix(Slice s, const char *prefix) {
    size_t n = strlen(prefix);
    return s.size >= n && !memcmp(s.bytes, prefix, n) ? (Slice){s.bytes + n, s.size - n} : s;
}

static bool json_format(const Check *c) {
    static const char *const fences[] = {"```json", "```Json", "```JSON", "```"};
    Slice s = slice_strip(c->text);
    for (int i = 0; i < 4; i++) s = without_prefix(s, fences[i]);
    if (s.size >= 3 && !memcmp(s.bytes + s.size - 3, "```", 3)) s.size -= 3;
    s = slice_strip(s);
    json_error_t error;
    json_t *value = json_loadb(s.bytes, s.size, JSON_DECODE_ANY, &error);
    bool good = value != NULL;
    json_decref(value);
    return good;
}

static bool title(const Check *c) {
    return count_not_blank(c->text, "<<[^\\n]+>>", "<>") > 0;
}

static bool two_responses(const Check *c) {
    size_t at = 0;
    Slice piece, kept[2] = {{NULL, 0}, {NULL, 0}};
    int64_t pieces = 0, full = 0, total = 0;
    while (next_piece(c->text, "******", &at, &piece)) total++;
    for (at = 0; next_piece(c->text, "******", &at, &piece); pieces++) {
        if (!slice_strip(piece).size) {
            if (pieces && pieces + 1 < total) return false;
        } else {
            if (full < 2) kept[full] = slice_strip(piece);
            full++;
        }
    }
    return full == 2 &&
           !(kept[0].size == kept[1].size && !memcmp(kept[0].bytes, kept[1].bytes, kept[0].size));
}

/* Whether a text begins (or ends) with another, case aside. */
static bool borders(Slice text, Slice part, bool at_end) {
    Text whole = lower(text), piece = lower(slice_strip(part));
    bool fits = piece.size <= whole.size;
    size_t from = fits && at_end ? whole.size - piece.size : 0;
    fits = fits && !memcmp(whole.bytes + from, piece.bytes, piece.size);
    text_free(&whole);
    text_free(&piece);
    return fits;
}

static bool repeat_prompt(const Check *c) {
    return borders(slice_strip(c->text), argument(c, "prompt_to_repeat"), false);
}

static bool end_checker(const Check *c) {
    Slice s = slice_strip(c->text);
    while (s.size && *s.bytes == '"') s.bytes++, s.size--;
    while (s.size && s.bytes[s.size - 1] == '"') s.size--;
    return borders(s, argument(c, "end_phrase"), true);
}

static bool no_comma(const Check *c) {
    return slice_find(c->text, ",", 0) == c->text.size;
}

static bool quotation(const Check *c) {
    Slice s = slice_strip(c->text);
    return s.size > 1 && *s.bytes == '"' && s.bytes[s.size - 1] == '"';
}

Status ifeval_follows(bool *follows, const char *id, const json_t *arguments, const json_t *doc,
                      Slice response) {
    static const struct {
        const char *id;
        bool (*check)(const Check *c);
    } checks[] = {{"keywords:existence", keywords_existence},
                  {"keywords:frequency", keywords_frequency},
                  {"keywords:forbidden_words", forbidden_words},
                  {"keywords:letter_frequency", letter_frequency},
                  {"language:response_language", response_language},
                  {"length_constraints:number_sentences", number_sentences},
                  {"length_constraints:number_paragraphs", number_paragraphs},
                  {"length_constraints:number_words", number_words},
                  {"length_constraints:nth_paragraph_first_word", nth_paragraph},
                  {"detectable_content:number_placeholders", placeholders},
                  {"detectable_content:postscript", postscript},
                  {"detectable_format:number_bullet_lists", bullet_lists},
                  {"detectable_format:constrained_response", constrained_response},
                  {"detectable_format:number_highlighted_sections", highlights},
                  {"detectable_format:multiple_sections", sections},
                  {"detectable_format:json_format", json_format},
                  {"detectable_format:title", title},
                  {"combination:two_responses", two_responses},
                  {"combination:repeat_prompt", repeat_prompt},
                  {"startend:end_checker", end_checker},
                  {"startend:quotation", quotation},
                  {"change_case:capital_word_frequency", capital_words},
                  {"change_case:english_capital", english_capital},
                  {"change_case:english_lowercase", english_lowercase},
                  {"punctuation:no_comma", no_comma}};
    if (!strncmp(id, "en:", 3)) id += 3; /* as multilingual copies of the data write it */
    Check c = {response, arguments, doc};
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        if (!strcmp(id, checks[i].id)) {
            *follows = slice_strip(response).size && checks[i].check(&c);
            return OK;
        }
    FAIL(ERR_FORMAT, "instruction '%s' is not known", id);
}

/* ---- a whole document ---- */

/* Variant v of a response: bit 0 without asterisks, bit 1 without the first line, bit 2 without the
 * last. */
static Text variant(Slice response, int v) {
    Text out = {0};
    Slice s = response;
    text_add(&out, "", 0);
    if (v & 2) {
        size_t at = slice_find(s, "\n", 0);
        s = at < s.size ? (Slice){s.bytes + at + 1, s.size - at - 1} : (Slice){s.bytes, 0};
    }
    if (v & 4) {
        size_t last = 0;
        bool any = false;
        for (size_t at = 0; (at = slice_find(s, "\n", at)) < s.size; at++) last = at, any = true;
        s.size = any ? last : 0;
    }
    if (v & 6) s = slice_strip(s);
    for (size_t i = 0; i < s.size; i++)
        if (!(v & 1) || s.bytes[i] != '*') text_add(&out, s.bytes + i, 1);
    return out;
}

Status ifeval_score(json_t **score, const json_t *doc, Slice response) {
    const json_t *ids = json_object_get(doc, "instruction_id_list"),
                 *kwargs = json_object_get(doc, "kwargs");
    json_t *strict = json_array(), *loose = json_array();
    bool all_strict = true, all_loose = true;
    Status status = OK;
    for (size_t i = 0; i < json_array_size(ids) && status == OK; i++) {
        const char *id = json_string_value(json_array_get(ids, i));
        bool first = false, any = false;
        for (int v = 0; v < 8 && status == OK && !any; v++) {
            Text text = variant(response, v);
            bool follows = false;
            status = ifeval_follows(&follows, id ? id : "", json_array_get(kwargs, i), doc,
                                    slice_text(&text));
            if (v == 0) first = follows;
            any |= follows;
            text_free(&text);
        }
        all_strict &= first;
        all_loose &= any;
        json_array_append_new(strict, json_boolean(first));
        json_array_append_new(loose, json_boolean(any));
    }
    *score = json_pack("{s:b, s:o, s:b, s:o}", "prompt_level_strict_acc", all_strict,
                       "inst_level_strict_acc", strict, "prompt_level_loose_acc", all_loose,
                       "inst_level_loose_acc", loose);
    return status;
}
