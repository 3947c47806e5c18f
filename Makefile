# Lapidary. `make` builds ./lapidary; `make demo`, `make test`, `make check` do what they say.
CC       ?= gcc
COMMA    := ,
PKGS     := yaml-0.1 hdf5 jansson nettle libprotobuf-c libpcre2-8 zlib libmicrohttpd libedit
# What reads pictures and sound, each where its library is found; a static program has those alone that come without others.
MEDIA    := $(foreach m,JPEG:libjpeg PNG:libpng WEBP:libwebpdemux $(if $(STATIC),,SNDFILE:sndfile SOXR:soxr LIBAV:libavformat),\
            $(shell pkg-config --exists $(lastword $(subst :, ,$(m))) 2>/dev/null && echo $(m)))
# Ranks, where an MPI is found; never in a static program.
MPI      := $(if $(STATIC),,$(shell pkg-config --exists ompi-c 2>/dev/null && echo ompi-c || { pkg-config --exists mpich 2>/dev/null && echo mpich; }))
MEDIAPKGS := $(foreach m,$(MEDIA),$(lastword $(subst :, ,$(m)))) $(if $(findstring LIBAV,$(MEDIA)),libavcodec libavutil libswscale)
PKG      := $(shell pkg-config --cflags $(PKGS) $(MEDIAPKGS) 2>/dev/null) $(foreach m,$(MEDIA),-DHAVE_$(firstword $(subst :, ,$(m)))) \
            $(if $(MPI),$(shell pkg-config --cflags $(MPI)) -DHAVE_MPI)
LIBS      = $(if $(STATIC),$(STATIC_LIBS),$(shell pkg-config --libs $(PKGS) $(MEDIAPKGS) $(MPI) 2>/dev/null)) $(if $(ONEDNN),-ldnnl) $(CUDA_LIBS) -lm
SANITIZE ?=
# The GPU's side is built where its compiler is found; CUDA=0 leaves it out.
CUDA_HOME ?= /usr/local/cuda
NVCC     := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc))
CUDA     ?= $(if $(SANITIZE),0,$(if $(NVCC),1,0))
BUILD    := build/$(if $(SANITIZE),$(SANITIZE),$(if $(filter 1,$(CUDA)),cuda,cpu))
WARN     := -Wall -Wextra -Werror -Wmissing-prototypes -Wno-unknown-pragmas -Wno-pass-failed
CFLAGS   := -std=gnu17 -O3 -g -fopenmp -fno-math-errno -fno-trapping-math -D_GNU_SOURCE -I. -I$(BUILD) $(WARN) $(PKG)
LDFLAGS  := $(if $(STATIC),,-fopenmp)
ifeq ($(SANITIZE),asan)
CFLAGS   += -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1
LDFLAGS  += -fsanitize=address,undefined
endif

# The GPU's kernels: code for the architectures named (90: with what Hopper alone has), and PTX that newer ones compile at
# start.
ARCH     ?= 90
ARCHS    := $(if $(filter all,$(ARCH)),80 89 90 100,$(ARCH))
NVFLAGS   = -std=c++17 -O3 -I. -lineinfo -Werror all-warnings -Xptxas -v,-warn-spills \
            $(foreach a,$(ARCHS:90=90a),-gencode arch=compute_$(a),code=sm_$(a)) \
            -gencode arch=compute_$(firstword $(ARCHS)),code=compute_$(firstword $(ARCHS)) \
            $(if $(filter 90,$(ARCHS)),-DLAPIDARY_HOPPER_CODE)
ifeq ($(CUDA),1)
CFLAGS   += -DLAPIDARY_CUDA
CUDA_LIBS := -L$(CUDA_HOME)/lib64 -lcudart_static $(if $(STATIC),-Wl$(COMMA)-Bstatic) -lstdc++ -Wl$(COMMA)-Bdynamic -ldl -lrt -lpthread
endif

# The CPU kernels, once for each instruction level of the architecture.
LEVEL         = -DLEVEL=$(1) -DLANES=$(2) -DLEVEL_PLAIN=$(3) -Wno-missing-prototypes
FLAGS_generic = $(call LEVEL,generic,4,1)
ifneq ($(filter aarch64%,$(shell $(CC) -dumpmachine)),)
LEVELS       := generic dotprod i8mm
FLAGS_dotprod = $(call LEVEL,dotprod,4,0) -march=armv8.2-a+fp16+dotprod
FLAGS_i8mm    = $(call LEVEL,i8mm,4,0) -march=armv8.2-a+fp16+dotprod+i8mm
else
LEVELS       := generic avx2 avx512
FLAGS_avx2    = $(call LEVEL,avx2,8,0) -mavx2 -mfma -mf16c
FLAGS_avx512  = $(call LEVEL,avx512,16,0) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c \
                -mprefer-vector-width=512
FLAGS_amx    := -mamx-tile -mamx-bf16 -mamx-int8 -mavx512bf16
ifdef STATIC
CFLAGS       += -DNO_ONEDNN
else
ONEDNN       := kernels/cpu/onednn.c
DNNL         := libdnnl-dev
endif
endif

FOLDERS  := kernels configs model formats data optim train infer eval
ONCE     := kernels/cpu/scratch.c
TILES    := $(wildcard kernels/cpu/amx*.c)
SOURCES  := $(foreach f,$(FOLDERS),$(wildcard $(f)/*.c)) $(ONCE) $(ONEDNN)
LEVELED  := $(filter-out $(ONCE) kernels/cpu/onednn.c $(TILES),$(wildcard kernels/cpu/*.c))
LEVELED_OBJECTS := $(foreach l,$(LEVELS),$(LEVELED:%.c=$(BUILD)/%.$(l).o)) $(if $(filter avx512,$(LEVELS)),$(TILES:%.c=$(BUILD)/%.avx512.o))
CLI      := $(wildcard cli/*.c)
OBJECTS  := $(SOURCES:%.c=$(BUILD)/%.o) $(LEVELED_OBJECTS)
CUDA_SOURCES := $(wildcard kernels/cuda/*.cu)
ifeq ($(CUDA),1)
OBJECTS  += $(CUDA_SOURCES:%.cu=$(BUILD)/%.cu.o)
endif
PROTO    := $(BUILD)/train/event.pb-c.o
LIBRARY  := $(BUILD)/liblapidary.a
PROGRAM  := $(BUILD)/lapidary

all: $(if $(SANITIZE),$(PROGRAM),lapidary)

# The newest build of any kind.
lapidary: $(PROGRAM)
	@ln -f $< $@

$(PROGRAM): $(CLI:%.c=$(BUILD)/%.o) $(LIBRARY)
	@echo "  ld $@"
	@$(CC) $(LDFLAGS) -o $@ $^ $(LIBS)

$(LIBRARY): $(OBJECTS) $(PROTO)
	@rm -f $@
	@ar rcs $@ $^

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	@echo "  cc $@"
	@$(CC) $(CFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/%.cu.o: %.cu
	@mkdir -p $(@D)
	@echo "  nvcc $@"
	@$(NVCC) $(NVFLAGS) -MMD -MP -MF $(@:.o=.d) -c -o $@ $< 2>$(@:.o=.log) || { grep -v 'ptxas info\|bytes stack' $(@:.o=.log) >&2; exit 1; }
	@! grep 'instructions are serialized' $(@:.o=.log) >&2 || { rm -f $@; exit 1; }

# Quantisers round every product: the same bytes at every level and as the peers write them.
$(foreach l,$(LEVELS),$(BUILD)/kernels/cpu/quantize.$(l).o $(BUILD)/kernels/cpu/int8.$(l).o \
    $(BUILD)/kernels/cpu/unpack.$(l).o $(BUILD)/kernels/cpu/amx_int8.$(l).o): CFLAGS += -ffp-contract=off

$(TILES:%.c=$(BUILD)/%.avx512.o): CFLAGS += $(FLAGS_amx)

define LEVEL_RULE
$(BUILD)/%.$(1).o: %.c
	@mkdir -p $$(@D)
	@echo "  cc $$@"
	@$$(CC) $$(CFLAGS) $$(FLAGS_$(1)) -MMD -MP -c -o $$@ $$<
endef
$(foreach l,$(LEVELS),$(eval $(call LEVEL_RULE,$(l))))

$(BUILD)/eval/task.o: eval/tasks.yaml
$(BUILD)/infer/server.o: infer/page.html

# TensorBoard's event record.
$(BUILD)/train/event.pb-c.c: train/event.proto
	@mkdir -p $(@D)
	@protoc-c --c_out=$(BUILD) $<
$(BUILD)/train/event.pb-c.o: $(BUILD)/train/event.pb-c.c
	@$(CC) $(CFLAGS) -c -o $@ $<
$(BUILD)/train/tensorboard.o: $(BUILD)/train/event.pb-c.c

# Tests: one runner from all cases, each case in a process of its own.
TEST_SOURCES := $(wildcard tests/*.c) $(wildcard tests/*/*.c)
RUNNER       := $(BUILD)/tests/run

# Without a GPU its kernels run on the host, under an emulator; the device `cuda` is that one then, in
# the runner and in a program of its own. Fronts come before the library's, which know no GPU. With
# SANITIZE=tsan the kernels, and they alone, are watched for races.
ifeq ($(CUDA)$(SANITIZE:tsan=),0)
SIMT_RACES   := $(if $(filter tsan,$(SANITIZE)),-fsanitize=thread -Wno-maybe-uninitialized)
SIMT_FLAGS   := $(if $(MPI),$(shell pkg-config --cflags $(MPI)) -DHAVE_MPI) -std=c++17 -O2 -g -I. -Itests/simt -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-missing-field-initializers -fno-strict-aliasing
SIMT         := $(patsubst %.c,$(BUILD)/simt/%.o,$(wildcard kernels/*.c)) \
                $(patsubst %.cu,$(BUILD)/simt/%.o,$(filter-out kernels/cuda/blaslt.cu kernels/cuda/nccl.cu,$(CUDA_SOURCES))) \
                $(patsubst %.cpp,$(BUILD)/%.o,$(wildcard tests/simt/*.cpp))
SIMT_PROGRAM := $(BUILD)/lapidary-simt
SIMT_LIBS    := -lstdc++ $(SIMT_RACES)
endif

$(RUNNER): $(TEST_SOURCES:%.c=$(BUILD)/%.o) $(SIMT) $(LIBRARY)
	@echo "  ld $@"
	@$(CC) $(LDFLAGS) -o $@ $^ $(LIBS) $(SIMT_LIBS)

$(BUILD)/lapidary-simt: $(CLI:%.c=$(BUILD)/%.o) $(SIMT) $(LIBRARY)
	@echo "  ld $@"
	@$(CC) $(LDFLAGS) -o $@ $^ $(LIBS) $(SIMT_LIBS)

$(BUILD)/simt/%.o: %.c
	@mkdir -p $(@D)
	@echo "  cc $@"
	@$(CC) $(CFLAGS) -DLAPIDARY_CUDA -MMD -MP -c -o $@ $<

$(BUILD)/simt/%.o: %.cu
	@mkdir -p $(@D)
	@echo "  c++ $@"
	@$(CXX) -x c++ $(SIMT_FLAGS) $(SIMT_RACES) -MMD -MP -c -o $@ $<
	@$(if $(SIMT_RACES),objcopy --rename-section .bss=simt_shared $@)

$(BUILD)/%.o: %.cpp
	@mkdir -p $(@D)
	@echo "  c++ $@"
	@$(CXX) $(SIMT_FLAGS) $(if $(SIMT_RACES),-DSIMT_RACES) -MMD -MP -c -o $@ $<

# The products of packed weights for another architecture, where a cross-compiler is at hand; a case
# runs them under emulation.
AARCH64  := aarch64-linux-gnu
runner: $(RUNNER) $(SIMT_PROGRAM) $(if $(shell command -v $(AARCH64)-gcc),aarch64)
PRODUCTS := $(BUILD)/tests/products
aarch64:
	@$(MAKE) --no-print-directory CC=$(AARCH64)-gcc BUILD=build/aarch64 PKG= SANITIZE= CUDA=0 build/aarch64/tests/products

$(PRODUCTS): $(patsubst %.c,$(BUILD)/%.o,tests/test.c tests/kernels/test_packed.c formats/file.c \
                 $(wildcard kernels/*.c) $(ONCE)) $(LEVELED_OBJECTS)
	@echo "  ld $@"
	@$(CC) $(LDFLAGS) -static -o $@ $^ -lm

# A program, its tests and, where CUPTI is, what times kernels, to carry to a GPU machine that has
# CUDA's libraries and no others: without oneDNN, so the CPU side is for small things.
static:
	@$(MAKE) --no-print-directory STATIC=1 BUILD=build/static build/static/lapidary build/static/tests/run
	@$(MAKE) --no-print-directory build/static/kernel_times.so || echo "no CUPTI: build/static/kernel_times.so is left out"
CUPTI    := $(CUDA_HOME)/extras/CUPTI
build/static/kernel_times.so: bench/kernel_times.c
	@mkdir -p $(@D)
	@echo "  cc $@"
	@$(CC) -O2 $(WARN) -Wno-missing-prototypes -shared -fPIC -I$(CUDA_HOME)/include -I$(CUPTI)/include -o $@ $< \
	    -L$(CUDA_HOME)/lib64 -L$(CUPTI)/lib64 -lcupti -lstdc++
STATIC_LIBS := -static-libgcc -Wl,-Bstatic $(MEDIAPKGS:lib%=-l%) -lwebp -lyaml -lhdf5_serial -lsz -laec -ljansson -lprotobuf-c -lpcre2-8 -lmicrohttpd -ledit \
               -ltinfo -lbsd -lmd -lz -lhogweed -lnettle -lgmp -l:libgomp.a -Wl,-Bdynamic -l:libgnutls.so.30

# All processors, unless make was told how many jobs.
JOBS      = $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(shell nproc))

test: deps
	@$(MAKE) --no-print-directory $(JOBS) CUDA=0 build/cpu/lapidary runner
	@tests/run.sh

# Without a GPU the demo needs no CUDA, which takes longer to build than the demo to run.
demo: deps
	@$(MAKE) --no-print-directory $(JOBS) $(if $(wildcard /dev/nvidiactl),,CUDA=0) all
	@MODEL="$(MODEL)" DATA="$(DATA)" demo/run.sh

# What the build needs, from Debian; asks for nothing when it is all there.
EXTRA    := gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user libopenmpi-dev openmpi-bin libavformat-dev libavcodec-dev libswscale-dev
DEPS     := gcc make pkg-config libyaml-dev libhdf5-dev libjansson-dev $(DNNL) nettle-dev libpcre2-dev zlib1g-dev libmicrohttpd-dev libedit-dev \
            libprotobuf-c-dev protobuf-c-compiler libjpeg62-turbo-dev libpng-dev libwebp-dev libsndfile1-dev libsoxr-dev
deps:
	@missing=$$(for p in $(DEPS) $(MORE); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	    echo "installing $$missing"; \
	    if [ "$$(id -u)" = 0 ]; then as=; else as=sudo; fi; \
	    $$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	fi

# What only some tests need, and what reads videos.
deps-all:
	@$(MAKE) --no-print-directory MORE="$(EXTRA)" deps

# By hand: every architecture of GPU and every instruction level of the CPU, the other compiler (15 or
# newer, with its OpenMP: clang-16 and libomp-16-dev), a minute for each fuzz target under sanitizers, and
# races between the threads of the GPU's kernels.
CLANG    ?= $(firstword $(foreach v,19 18 17 16 15,$(shell command -v clang-$(v))))
check-all: check
	@$(MAKE) --no-print-directory CUDA=1 ARCH=all BUILD=build/cuda-all build/cuda-all/lapidary
	@[ -n "$(CLANG)" ] || { echo "no clang, 15 or newer"; exit 1; }
	@$(MAKE) --no-print-directory CC=$(CLANG) CUDA=0 BUILD=build/clang build/clang/lapidary build/clang/tests/run
	@BACKEND=clang tests/run.sh quick
	@for level in generic avx2 avx512; do echo "LAPIDARY_CPU=$$level"; LAPIDARY_CPU=$$level tests/run.sh | tail -2; done
	@LAPIDARY_FUZZ_SECONDS=60 SANITIZE=asan tests/run.sh fuzz.
	@$(MAKE) --no-print-directory races

# Format, then the suite under sanitizers.
check:
	@clang-format --dry-run -Werror $$(git ls-files '*.c' '*.h' '*.cu' '*.cpp')
	@$(MAKE) --no-print-directory SANITIZE=asan all runner
	@SANITIZE=asan tests/run.sh quick

# All cases of the GPU's kernels on the emulator, watched for races, and those that multiply out of
# shared memory for fences too: twenty-five minutes.
races:
	@$(MAKE) --no-print-directory $(JOBS) SANITIZE=tsan all runner
	@SANITIZE=tsan tests/run.sh gpu.
	@LAPIDARY_SIMT_FENCES=1 SANITIZE=tsan tests/run.sh gpu.products_with_terms gpu.products_of_groups gpu.attention_of_heads gpu.attention_in_slabs

# What each of the GPU's kernels takes, from the compiler's own account; spilled registers and
# tensor-core products that wait for each other are errors of the build.
registers: all
	@kernels/cuda/registers.sh $(CUDA_SOURCES:%.cu=$(BUILD)/%.cu.log)

install: all
	install -D -m 755 lapidary $(DESTDIR)$(PREFIX)/bin/lapidary
PREFIX   ?= /usr/local

clean:
	rm -rf build lapidary

.PHONY: all static registers races runner aarch64 test demo deps deps-all check check-all install clean
-include $(shell find build -name '*.d' 2>/dev/null)
