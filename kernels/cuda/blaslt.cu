/* blaslt.cu - the library's functions by name, and a plan for each shape. */
#include "kernels/cuda/blaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#define WORKSPACE ((size_t)32 << 20)
#define PLANS_MAX 4096

#define FUNCTIONS(X)                                                                               \
    X(cublasLtCreate)                                                                              \
    X(cublasLtMatmulDescCreate)                                                                    \
    X(cublasLtMatmulDescSetAttribute)                                                              \
    X(cublasLtMatrixLayoutCreate)                                                                  \
    X(cublasLtMatmulPreferenceCreate)                                                              \
    X(cublasLtMatmulPreferenceSetAttribute)                                                        \
    X(cublasLtMatmulPreferenceDestroy)                                                             \
    X(cublasLtMatmulAlgoGetHeuristic)                                                              \
    X(cublasLtMatmul)

/* Types come from the header, functions from the library that is there. */
static struct {
#define POINTER(name) __typeof__(&::name) name;
    FUNCTIONS(POINTER)
#undef POINTER
} lt;

struct Key {
    int32_t device, layout, y_dtype, dtype;
    int64_t M, N, K, y_stride, a_stride;
    int32_t alignment, padding;
};

struct Plan {
    Key key;
    bool ready;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t left, right, out;
    cublasLtMatmulAlgo_t algorithm;
};

struct Library {
    cublasLtHandle_t handle;
    void *workspace;
};

static Library libraries[CUDA_DEVICES];
static Plan *plans;

static void *open_library() {
    char name[32];
    void *library = NULL;
    snprintf(name, sizeof name, "libcublasLt.so.%d", CUBLAS_VER_MAJOR);
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        give_up("the GPU's products need cuBLASLt: %s; it comes with the CUDA toolkit, or give "
                "--device cpu",
                dlerror());
    return library;
}

static void check(cublasStatus_t status, const char *what, const Key *k) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    if (k)
        give_up("cuBLASLt: %s of %lld x %lld x %lld fails with status %d", what, (long long)k->M,
                (long long)k->N, (long long)k->K, (int)status);
    give_up("cuBLASLt: %s fails with status %d", what, (int)status);
}

static Library *library_of(const Device *device) {
    Library *l = &libraries[device->index];
    if (l->handle) return l;
    if (!lt.cublasLtCreate) {
        void *library = open_library();
#define FIND(name)                                                                                 \
    lt.name = (__typeof__(lt.name))dlsym(library, #name);                                          \
    if (!lt.name) give_up("cuBLASLt has no %s", #name);
        FUNCTIONS(FIND)
#undef FIND
        plans = (Plan *)must_calloc(PLANS_MAX, sizeof *plans);
    }
    cuda_stream(device);
    check(lt.cublasLtCreate(&l->handle), "opening", NULL);
    l->workspace = device_allocate((Device *)device, WORKSPACE);
    if (!l->workspace) give_up("the GPU is out of memory for cuBLASLt's workspace");
    return l;
}

static uint64_t hash(const Key *k) {
    uint64_t h = 0;
    const uint32_t *words = (const uint32_t *)k;
    for (size_t i = 0; i < sizeof *k / 4; i++) h = random_mix(h ^ words[i]);
    return h;
}

static cudaDataType_t type_of(DType dtype) {
    return dtype == F32 ? CUDA_R_32F : CUDA_R_16BF;
}

/* cuBLASLt counts columns first, so y^T = b^T a^T is asked for. */
static void make_plan(Library *l, Plan *p, const Key *k) {
    Layout layout = (Layout)k->layout;
    cublasOperation_t turn_left = layout == NT ? CUBLAS_OP_T : CUBLAS_OP_N,
                      turn_right = layout == TN ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t best;
    size_t workspace = WORKSPACE;
    uint32_t alignment = (uint32_t)k->alignment;
    int found = 0;
    p->key = *k;
    check(lt.cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a plan", k);
    lt.cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &turn_left,
                                      sizeof turn_left);
    lt.cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &turn_right,
                                      sizeof turn_right);
    cudaDataType_t type = type_of((DType)k->dtype);
    bool b_by_k = layout == NT; /* rows of b are along K */
    check(lt.cublasLtMatrixLayoutCreate(&p->left, type, (uint64_t)(b_by_k ? k->K : k->N),
                                        (uint64_t)(b_by_k ? k->N : k->K), b_by_k ? k->K : k->N),
          "a plan", k);
    check(lt.cublasLtMatrixLayoutCreate(&p->right, type, (uint64_t)(layout == TN ? k->M : k->K),
                                        (uint64_t)(layout == TN ? k->K : k->M), k->a_stride),
          "a plan", k);
    check(lt.cublasLtMatrixLayoutCreate(&p->out, type_of((DType)k->y_dtype), (uint64_t)k->N,
                                        (uint64_t)k->M, k->y_stride),
          "a plan", k);
    check(lt.cublasLtMatmulPreferenceCreate(&preference), "a plan", k);
    lt.cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                            &workspace, sizeof workspace);
    const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; i++)
        lt.cublasLtMatmulPreferenceSetAttribute(preference, alignments[i], &alignment,
                                                sizeof alignment);
    check(lt.cublasLtMatmulAlgoGetHeuristic(l->handle, p->operation, p->left, p->right, p->out,
                                            p->out, preference, 1, &best, &found),
          "looking for a way to multiply", k);
    if (!found) check(CUBLAS_STATUS_NOT_SUPPORTED, "a product", k);
    lt.cublasLtMatmulPreferenceDestroy(preference);
    p->algorithm = best.algo;
    p->ready = true;
}

static Plan *plan_of(Library *l, const Key *k) {
    uint64_t at = hash(k);
    for (int i = 0; i < PLANS_MAX; i++) {
        Plan *p = &plans[(at + (uint64_t)i) % PLANS_MAX];
        if (p->ready && !memcmp(&p->key, k, sizeof *k)) return p;
        if (p->ready) continue;
        make_plan(l, p, k);
        return p;
    }
    give_up("more than %d shapes of products", PLANS_MAX);
}

void blaslt_matmul(const Device *device, Layout layout, void *y, DType y_dtype, int64_t y_stride,
                   Write write, const void *a, int64_t a_stride, const void *b, DType dtype,
                   int64_t M, int64_t N, int64_t K, float alpha) {
    uintptr_t places = (uintptr_t)y | (uintptr_t)a | (uintptr_t)b | 256;
    Key key;
    memset(&key, 0, sizeof key);
    key.device = device->index;
    key.layout = layout;
    key.y_dtype = y_dtype;
    key.dtype = dtype;
    key.M = M;
    key.N = N;
    key.K = K;
    key.y_stride = y_stride;
    key.a_stride = a_stride;
    key.alignment = (int32_t)(places & -places);
    Library *l = library_of(device);
    Plan *p = plan_of(l, &key);
    float beta = write == ADD ? 1.0f : 0.0f;
    check(lt.cublasLtMatmul(l->handle, p->operation, &alpha, b, p->left, a, p->right, &beta, y,
                            p->out, y, p->out, &p->algorithm, l->workspace, WORKSPACE,
                            cuda_stream(device)),
          "a product", &key);
}
