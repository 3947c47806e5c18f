/* metrics.h - means, their errors, groups, and what k samples of one problem say.
 *
 * Formulas and the order of sums are lm-evaluation-harness 0.4.13's, so its figures come out. */
#ifndef METRICS_EVAL_H
#define METRICS_EVAL_H

#include "data/text.h"

typedef struct Estimate {
    double mean, stderr_; /* NAN: one value has no error */
    int64_t n;
} Estimate;

/* Mean and standard error: sample standard deviation (n - 1) / sqrt(n). */
Estimate estimate_mean(const double *values, int64_t n);

/* A group: parts weighted by their size, with the pooled error; or, unweighted, all alike. */
Estimate estimate_group(const Estimate *parts, int64_t count, bool weighted);

/* Two-sided 95 % interval around a share of n, by Wilson's score (Wilson 1927). */
void wilson_interval(double share, int64_t n, double *low, double *high);

/* Standard error of a statistic by resampling: blocks of min(1000, iterations) resamples, block i
 * drawn by CPython's generator seeded with i. */
typedef double Statistic(const double *values, int64_t n);
double bootstrap_error(Statistic *statistic, const double *values, int64_t n, int64_t iterations);
double median_of(const double *values, int64_t n);

/* The unbiased chance that one of k out of n samples, c of them right, is right (Chen et al. 2021).
 */
double pass_at_k(int64_t n, int64_t c, int64_t k);

/* The answer that most gave; ties go to the one that came first. Index into answers. */
int64_t majority_vote(const Slice *answers, int64_t n);

/* What choosing by log-likelihood gives: by sum, by sum a character, by sum a byte; ties to the
 * first. */
typedef struct Choosing {
    int64_t by_sum, by_characters, by_bytes;
} Choosing;
Choosing choose(const double *lls, const Slice *choices, int64_t n);

/* Perplexity of documents: words are the pieces between runs of white space, as re.split counts
 * them. */
int64_t count_words(Slice text);

/* Windows of a rolling log-likelihood over n tokens: targets do not overlap. Window i predicts
 * tokens targets .. targets + count - 1 after `context` tokens before them (the prefix token counts
 * as token -1). */
typedef struct Window {
    int64_t targets, count, context;
} Window;
int64_t rolling_window(Window *w, int64_t i, int64_t n, int64_t most, int64_t context);

#endif
