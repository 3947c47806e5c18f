/* onednn.c - a table of matmul primitives by shape, dtype and layout.
 *
 * Making a primitive costs up to a millisecond, finding it again a few nanoseconds; the memory
 * objects live beside it and only their pointers change. Batches of ever new sizes would fill
 * memory with generated code (about 140 KB a shape), so a full table starts over, and oneDNN's own
 * cache is off. */
#include "kernels/cpu/onednn.h"

#include <dnnl.h>
#include <string.h>

typedef struct Key {
    int64_t M, N, K, stride;
    int32_t layout, write, in, out;
} Key;

typedef struct Product {
    Key key;
    dnnl_primitive_t primitive;
    dnnl_memory_t a, b, y;
} Product;

static dnnl_engine_t engine;
static dnnl_stream_t stream;
#define TABLE_SIZE 2048           /* a power of two; half of it is filled */
static Product table[TABLE_SIZE]; /* open addressing */
static size_t table_used;

#define DNNL_CHECK(call) CHECK((call) == dnnl_success, "oneDNN refused a product")

static size_t hash_key(const Key *key) {
    uint64_t h = (uint64_t)key->M * 0x9e3779b97f4a7c15u ^ (uint64_t)key->N * 0xd1342543de82ef95u;
    h ^= (uint64_t)key->K * 0xbf58476d1ce4e5b9u ^ (uint64_t)key->stride * 0x94d049bb133111ebu;
    h ^= (uint64_t)(key->layout * 1000 + key->write * 100 + key->in * 10 + key->out) << 40;
    return (size_t)(h ^ (h >> 29));
}

static Product *table_find(const Key *key) {
    for (size_t i = hash_key(key);; i++) {
        Product *p = &table[i & (TABLE_SIZE - 1)];
        if (!p->primitive || !memcmp(&p->key, key, sizeof *key)) return p;
    }
}

static void table_clear(void) {
    for (size_t i = 0; i < TABLE_SIZE; i++) {
        if (!table[i].primitive) continue;
        dnnl_primitive_destroy(table[i].primitive);
        dnnl_memory_destroy(table[i].a);
        dnnl_memory_destroy(table[i].b);
        dnnl_memory_destroy(table[i].y);
    }
    memset(table, 0, sizeof table);
    table_used = 0;
}

/* (rows, cols), stored as it is or transposed, lines of `stride` elements. */
static dnnl_memory_desc_t describe(int64_t rows, int64_t cols, bool transposed, int64_t stride,
                                   DType dtype) {
    dnnl_memory_desc_t desc;
    dnnl_dims_t dims = {rows, cols}, strides = {transposed ? 1 : stride, transposed ? stride : 1};
    DNNL_CHECK(dnnl_memory_desc_init_by_strides(&desc, 2, dims,
                                                dtype == BF16 ? dnnl_bf16 : dnnl_f32, strides));
    return desc;
}

static void product_make(Product *p, const Key *key) {
    bool a_turned = key->layout == TN, b_turned = key->layout == NT;
    dnnl_memory_desc_t a = describe(key->M, key->K, a_turned, a_turned ? key->M : key->K, key->in);
    dnnl_memory_desc_t b = describe(key->K, key->N, b_turned, b_turned ? key->K : key->N, key->in);
    dnnl_memory_desc_t y = describe(key->M, key->N, false, key->stride, key->out);
    dnnl_matmul_desc_t desc;
    DNNL_CHECK(dnnl_matmul_desc_init(&desc, &a, &b, NULL, &y));
    dnnl_primitive_attr_t attributes;
    DNNL_CHECK(dnnl_primitive_attr_create(&attributes));
    dnnl_post_ops_t after;
    DNNL_CHECK(dnnl_post_ops_create(&after));
    if (key->write == ADD) DNNL_CHECK(dnnl_post_ops_append_sum(after, 1.0f));
    DNNL_CHECK(dnnl_primitive_attr_set_post_ops(attributes, after));
    dnnl_primitive_desc_t primitive_desc;
    DNNL_CHECK(dnnl_primitive_desc_create(&primitive_desc, &desc, attributes, engine, NULL));
    DNNL_CHECK(dnnl_primitive_create(&p->primitive, primitive_desc));
    DNNL_CHECK(dnnl_memory_create(&p->a, &a, engine, DNNL_MEMORY_NONE));
    DNNL_CHECK(dnnl_memory_create(&p->b, &b, engine, DNNL_MEMORY_NONE));
    DNNL_CHECK(dnnl_memory_create(&p->y, &y, engine, DNNL_MEMORY_NONE));
    dnnl_primitive_desc_destroy(primitive_desc);
    dnnl_post_ops_destroy(after);
    dnnl_primitive_attr_destroy(attributes);
    p->key = *key;
}

void onednn_product(Layout layout, Tensor y, int64_t stride, Write write, Tensor a, Tensor b) {
    if (!engine) {
        DNNL_CHECK(dnnl_set_primitive_cache_capacity(0));
        DNNL_CHECK(dnnl_engine_create(&engine, dnnl_cpu, 0));
        DNNL_CHECK(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags));
    }
    if (2 * table_used >= TABLE_SIZE) table_clear();
    Key key = {.M = tensor_rows(y),
               .N = tensor_cols(y),
               .K = layout == TN ? tensor_rows(a) : tensor_cols(a),
               .stride = stride,
               .layout = layout,
               .write = write,
               .in = a.dtype,
               .out = y.dtype};
    Product *p = table_find(&key);
    if (!p->primitive) {
        product_make(p, &key);
        table_used++;
    }
    dnnl_memory_set_data_handle_v2(p->a, a.data, stream);
    dnnl_memory_set_data_handle_v2(p->b, b.data, stream);
    dnnl_memory_set_data_handle_v2(p->y, y.data, stream);
    dnnl_exec_arg_t arguments[] = {
        {DNNL_ARG_SRC, p->a}, {DNNL_ARG_WEIGHTS, p->b}, {DNNL_ARG_DST, p->y}};
    DNNL_CHECK(dnnl_primitive_execute(p->primitive, stream, 3, arguments));
    DNNL_CHECK(dnnl_stream_wait(stream));
}
