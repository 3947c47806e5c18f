/* judge.h - whether a program does what is asked: the tests of HumanEval and MBPP, and
 * LiveCodeBench's, which look at what it prints or what a method of it returns. */
#ifndef JUDGE_H
#define JUDGE_H

#include "eval/rules.h"

/* Runs what a response came to (v->extracted) with the tests of its document, in the sandbox;
 * v->score becomes 1 or 0. */
Status judge_program(Verdict *v, const Task *task, const json_t *doc);

/* Whether the program passes every case {input, output}: read from standard input and printed, or
 * with `function` (a string) arguments and result of a method of class Solution, as JSON. */
Status judge_cases(bool *passed, const Text *program, const json_t *cases, const json_t *function);

/* Whether two outputs are the same: line by line without outer white space; lines that differ by
 * their numbers. */
bool judge_same(Slice a, Slice b);

/* The hidden cases of a release: a list in JSON, or that pickled, compressed and in base 64. Caller
 * decrefs. */
Status judge_decode(json_t **cases, Slice text);

#endif
