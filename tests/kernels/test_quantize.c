/* test_quantize.c - blocks are the bytes that llama.cpp and bitsandbytes make; training through a
 * scheme sees what the file will hold. */
#include "formats/file.h"
#include "formats/sha256.h"
#include "kernels/blocks.h"
#include "kernels/dynamic.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/quantize.h"
#include "tests/fixture.h"

#include <math.h>

#define COUNT (1 << 20)

/* The numbers of quantize_fixtures.py. */
static float *fixture_values(int64_t count) {
    float *x = must_malloc((size_t)count * sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        uint64_t z = (uint64_t)i * 0x9e3779b97f4a7c15u + 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        int64_t total = 0;
        for (int k = 0; k < 4; k++) total += (int64_t)(z >> (16 * k) & 0xffff);
        x[i] = (float)(total - 131070) * 0x1p-20f;
    }
    return x;
}

static void expect_hash(const Fixture *f, const char *name, const void *bytes, size_t size) {
    int64_t count;
    char hash[65], dataset[64];
    snprintf(dataset, sizeof dataset, "%s_sha256", name);
    uint8_t *expected = fixture_bytes(f, dataset, &count);
    sha256_text(hash, bytes, size);
    EXPECT(count == 64 && !memcmp(hash, expected, 64), "%s: other bytes than the peer's", name);
    free(expected);
}

static Tensor make(DType dtype, int64_t rows, int64_t cols) {
    Tensor t = TENSOR(NULL, dtype, rows, cols);
    t.data = aligned_alloc(64, (tensor_bytes(t) + 63) / 64 * 64);
    return t;
}

CASE(quantize, q4_0_and_q8_0_are_the_bytes_of_llama_cpp) {
    static const struct {
        const char *name;
        DType dtype;
    } kinds[] = {{"q4_0", Q4_0}, {"q8_0", Q8_0}};
    Fixture f = fixture_open_plain("quantize.h5");
    Tensor x = TENSOR(fixture_values(COUNT), F32, COUNT / 1024, 1024);
    int64_t edges, size;
    float *edge = fixture_floats(&f, "edges", &edges);
    for (int i = 0; i < 2; i++) {
        Tensor packed = make(kinds[i].dtype, COUNT / 1024, 1024);
        quantize(packed, x);
        expect_hash(&f, kinds[i].name, packed.data, tensor_bytes(packed));
        char name[32];
        snprintf(name, sizeof name, "edges_%s", kinds[i].name);
        uint8_t *expected = fixture_bytes(&f, name, &size);
        Tensor small = make(kinds[i].dtype, edges / 64, 64);
        quantize(small, TENSOR(edge, F32, edges / 64, 64));
        for (int64_t b = 0; b < size; b++)
            EXPECT(expected[b] == ((uint8_t *)small.data)[b],
                   "%s: byte %d of the edges is %d, not %d", kinds[i].name, (int)b,
                   ((uint8_t *)small.data)[b], expected[b]);
        Tensor tiled = make(dtype_tiled(kinds[i].dtype), COUNT / 1024, 1024),
               direct = make(tiled.dtype, COUNT / 1024, 1024);
        Tensor back = make(kinds[i].dtype, COUNT / 1024, 1024);
        repack(tiled, packed);
        quantize(direct, x);
        repack(back, tiled);
        EXPECT(!memcmp(tiled.data, direct.data, tensor_bytes(tiled)),
               "tiling is not quantising into tiles");
        EXPECT(!memcmp(back.data, packed.data, tensor_bytes(packed)), "tiling loses bits");
        float *plain = must_malloc(COUNT * 4), *through = must_malloc(COUNT * 4);
        scale_copy(TENSOR(plain, F32, COUNT), SET, packed, 1);
        scale_copy(TENSOR(through, F32, COUNT), SET, tiled, 1);
        EXPECT(!memcmp(plain, through, COUNT * 4), "tiles read as other values");
    }
}

CASE(quantize, infinities_and_nans_are_found) {
    float x[64] = {0};
    bool finite;
    check_finite(&finite, TENSOR(x, F32, 1, 64));
    EXPECT(finite);
    for (int i = 0; i < 3; i++) {
        x[40] = i == 0 ? INFINITY : i == 1 ? NAN : -INFINITY;
        check_finite(&finite, TENSOR(x, F32, 1, 64));
        EXPECT(!finite);
    }
}

CASE(quantize, k_quants_read_as_the_gguf_package_reads_them) {
    static const struct {
        const char *name;
        DType dtype;
    } kinds[] = {{"q4_k", Q4_K}, {"q5_k", Q5_K}, {"q6_k", Q6_K}};
    Fixture f = fixture_open_plain("quantize.h5");
    for (int i = 0; i < 3; i++) {
        char name[32];
        int64_t size, count;
        snprintf(name, sizeof name, "%s_values", kinds[i].name);
        uint8_t *bytes = fixture_bytes(&f, kinds[i].name, &size);
        float *expected = fixture_floats(&f, name, &count),
              *values = must_malloc((size_t)count * 4);
        Tensor packed = TENSOR(bytes, kinds[i].dtype, count / 1024, 1024);
        EXPECT((int64_t)tensor_bytes(packed) == size);
        scale_copy(TENSOR(values, F32, count), SET, packed, 1);
        EXPECT(relative_error(values, expected, count) < 1e-7, "%s reads otherwise", kinds[i].name);
    }
}

CASE(quantize, nf4_is_the_bytes_of_bitsandbytes) {
    Fixture f = fixture_open_plain("quantize.h5");
    Tensor x = TENSOR(fixture_values(COUNT), F32, COUNT / 1024, 1024);
    Tensor plain = make(NF4, COUNT / 1024, 1024), nested = make(NF4_NESTED, COUNT / 1024, 1024);
    int64_t blocks = COUNT / 64, count;
    uint8_t *codes = must_malloc(COUNT / 2), *nested_codes = must_malloc(COUNT / 2);
    float *absmax = must_malloc((size_t)blocks * 4);
    quantize(plain, x);
    quantize(nested, x);
    for (int64_t b = 0; b < blocks; b++) {
        absmax[b] = ((BlockNF4 *)plain.data)[b].absmax;
        memcpy(codes + 32 * b, ((BlockNF4 *)plain.data)[b].qs, 32);
        memcpy(nested_codes + 32 * b, ((BlockNF4Nested *)nested.data)[b / 256].qs[b % 256], 32);
    }
    expect_hash(&f, "nf4", codes, COUNT / 2);
    expect_hash(&f, "nf4", nested_codes, COUNT / 2);
    expect_hash(&f, "nf4_absmax", absmax, (size_t)blocks * 4);
    uint8_t *levels = fixture_bytes(&f, "nf4_nested_absmax", &count);
    float *scale = fixture_floats(&f, "nf4_nested_scale", &count);
    float offset = *fixture_floats(&f, "nf4_nested_offset", &count);
    const BlockNF4Nested *n = nested.data;
    EXPECT(n->offset == offset, "offset %.9g, bitsandbytes has %.9g", n->offset, offset);
    for (int64_t b = 0; b < blocks; b++) {
        EXPECT(n[b / 256].absmax[b % 256] == levels[b], "scale code of block %d is %d, not %d",
               (int)b, n[b / 256].absmax[b % 256], levels[b]);
        EXPECT(n[b / 256].scale == scale[b / 256]);
    }
    float values[4096], *expected = fixture_floats(&f, "nf4_values", &count);
    scale_copy(TENSOR(values, F32, 4, 1024), SET, tensor_slice(nested, 0, 4), 1);
    EXPECT(relative_error(values, expected, 4096) < 1e-7);
    float *tables[] = {fixture_floats(&f, "dynamic_unsigned", &count),
                       fixture_floats(&f, "dynamic", &count)};
    for (int s = 0; s < 2; s++)
        for (int i = 0; i < 256; i++)
            EXPECT(dynamic_levels(s)[i] == tables[s][i], "level %d of %d: %.9g, not %.9g", i, s,
                   dynamic_levels(s)[i], tables[s][i]);
}

CASE(quantize, slices_of_packed_tensors_read_the_same_values) {
    static const DType kinds[] = {Q4_0, Q8_0, NF4, NF4_NESTED, Q4_0_TILED, Q8_0_TILED};
    Tensor x = RANDOM_TENSOR(F32, 5, 6, 48, 128);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        Tensor packed = TENSOR(NULL, kinds[i], 6, 48, 128);
        packed.data = aligned_alloc(64, (tensor_bytes(packed) + 63) / 64 * 64);
        quantize(packed, x);
        float *all = must_malloc(6 * 48 * 128 * 4), part[16 * 128];
        scale_copy(TENSOR(all, F32, 6 * 48 * 128), SET, packed, 1);
        EXPECT(relative_error(all, x.data, 6 * 48 * 128) < 0.15);
        scale_copy(TENSOR(part, F32, 16, 128), SET, tensor_slice(tensor_at(packed, 4), 32, 16), 1);
        EXPECT(!memcmp(part, all + (4 * 48 + 32) * 128, sizeof part), "%s", dtype_name(kinds[i]));
    }
}

CASE(quantize, training_sees_what_the_file_will_hold) {
    static const QuantScheme schemes[] = {SCHEME_Q4_0, SCHEME_Q8_0, SCHEME_INT8, SCHEME_INT4};
    Tensor x = RANDOM_TENSOR(F32, 9, 24, 128);
    float seen[24 * 128], stored[24 * 128], half[24 * 128];
    for (int i = 0; i < 4; i++) {
        Tensor packed = make(scheme_dtype(schemes[i]), 24, 128), y = TENSOR(seen, F32, 24, 128);
        fake_quantize(y, x, tensor_absent(), schemes[i], 1);
        quantize_scheme(packed, x, tensor_absent(), schemes[i]);
        scale_copy(TENSOR(stored, F32, 24, 128), SET, packed, 1);
        EXPECT(!memcmp(seen, stored, sizeof seen), "scheme %d", schemes[i]);
        if (schemes[i] == SCHEME_Q4_0 || schemes[i] == SCHEME_Q8_0) { /* and that is ggml's file */
            Tensor plain = make(packed.dtype, 24, 128);
            quantize(plain, x);
            EXPECT(!memcmp(plain.data, packed.data, tensor_bytes(plain)));
        }
        fake_quantize(TENSOR(half, F32, 24, 128), x, tensor_absent(), schemes[i], 0.25f);
        for (int k = 0; k < 24 * 128; k++) {
            float v = ((float *)x.data)[k];
            EXPECT_CLOSE(half[k], v + 0.25f * (seen[k] - v), 1e-6);
        }
    }
}

CASE(quantize, the_gradient_passes_straight_through_but_not_where_codes_are_clipped) {
    float x[32], g[32], dfactor = 0;
    for (int i = 0; i < 32; i++) x[i] = 0.1f * (float)(i % 8), g[i] = 1;
    x[3] = -4; /* scale 0.5: codes reach 3.5 */
    x[7] = 3.9f;
    Tensor t = TENSOR(x, F32, 1, 32);
    fake_quantize_backward(TENSOR(g, F32, 1, 32), tensor_absent(), t, tensor_absent(), SCHEME_Q4_0,
                           1);
    for (int i = 0; i < 32; i++) EXPECT(g[i] == (i == 7 ? 0 : 1), "element %d: %g", i, g[i]);

    /* A learned factor f of the scale 0.5: y = 0.5 f code, and where in range the rounding counts
     * as constant, so that dy/df is (y - x) / f, else y / f. */
    float f = 0.25f, y[32], up[32];
    for (int i = 0; i < 32; i++) g[i] = (float)(i % 5) - 2;
    float keep[32];
    memcpy(keep, g, sizeof g);
    Tensor factor = TENSOR(&f, F32, 1);
    fake_quantize(TENSOR(y, F32, 1, 32), t, factor, SCHEME_Q4_0, 1);
    double expected = 0;
    for (int i = 0; i < 32; i++) {
        float slope = y[i] / f;
        bool clipped = x[i] / (0.5f * f) < -8.5f || x[i] / (0.5f * f) >= 7.5f;
        expected += (double)keep[i] * (clipped ? slope : slope - x[i] / f);
        up[i] = clipped ? 0 : keep[i];
    }
    fake_quantize_backward(TENSOR(g, F32, 1, 32), TENSOR(&dfactor, F32, 1), t, factor, SCHEME_Q4_0,
                           1);
    EXPECT_CLOSE(dfactor, expected, 1e-4);
    EXPECT(!memcmp(g, up, sizeof g));
}

static void quantize_row_of_33(void) {
    float x[33] = {0}, y[33];
    quantize(TENSOR(y, Q4_0, 1, 33), TENSOR(x, F32, 1, 33));
}

CASE(quantize, a_row_that_is_no_whole_blocks_is_refused) {
    EXPECT(test_faults(quantize_row_of_33));
}
