/* template.h - text with the fields of a document in it.
 *
 * {name} is a field's text, {name.0} an item of a list, {name|rule} the field under a rule; {{ and
 * }} are braces. Rules: strip; words (underscores to spaces); letter (0 to A); lettered (a list as
 * lines "A. text", ten at most; lettered_stripped: each one stripped); without X (X deleted where
 * it stands); after_hashes (behind the last "### "); boxed (the last \boxed of a solution);
 * without_box_request (an added wish for a box taken off); last_block
 * (the lines of the last fenced block); starter_format (how LiveCodeBench asks for code);
 * before_fence and fenced (code up to, and in, the first ``` of a reply). */
#ifndef TEMPLATE_H
#define TEMPLATE_H

#include "eval/task.h"

/* Appends the template. A field that the document lacks is an error naming it. Fields of `more`
 * (may be NULL) come before the document's. */
Status template_render(Text *out, const char *text, const Task *task, const json_t *doc,
                       const json_t *more);

/* The value of a field by any of the names that the task gives it; NULL: none. */
const json_t *document_field(const Task *task, const json_t *doc, const char *name, size_t size);

/* Appends a field's value as text: strings as they are, other values as JSON. */
void text_add_value(Text *out, const json_t *value);

#endif
