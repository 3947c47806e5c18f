/* test_aarch64.c - the products of packed weights for aarch64, under qemu's user mode: every level
 * of that architecture. `make runner` builds them where the cross-compiler is installed. */
#include "formats/file.h"
#include "tests/test.h"

#define PRODUCTS "build/aarch64/tests/products"

CASE(aarch64, every_level_computes_the_products_of_packed_weights) {
    static const char *const levels[] = {"generic", "dotprod", "i8mm"};
    char *log = must_format("%s/log", test_folder()), *text;
    size_t size;
    if (!file_exists(PRODUCTS) || system("command -v qemu-aarch64 >/dev/null"))
        SKIP("needs gcc-aarch64-linux-gnu and qemu-user (make deps-all)");
    for (int i = 0; i < 3; i++) {
        char *command = must_format("LAPIDARY_CPU=%s qemu-aarch64 -cpu max " PRODUCTS
                                    " packed_matmul.eight packed_matmul.a_rows "
                                    "packed_matmul.groups >%s 2>&1",
                                    levels[i], log);
        int status = system(command);
        EXPECT_OK(file_read(&text, &size, log, 1 << 20));
        EXPECT(!status && strstr(text, "3 passed, 0 failed") && !strstr(text, "LAPIDARY_CPU"),
               "%s: %s", levels[i], text);
        free(text);
        free(command);
    }
    free(log);
}
