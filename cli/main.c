/* main.c - picks the command; prints its error once; ends with its exit status. */
#include "cli/command.h"
#include "kernels/comm.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name;
    Status (*run)(int argc, char **argv);
    const char *about;
} commands[] = {
    {"init", command_init, "write a checkpoint with random weights"},
    {"inspect", command_inspect, "say what a checkpoint, adapter, dataset or run folder holds"},
    {"prepare", command_prepare, "tokenise, mask and store a dataset in HDF5"},
    {"doctor", command_doctor, "check data, template, memory and gradients before training"},
    {"plan", command_plan, "memory and traffic of a run's ranks, before it runs"},
    {"train", command_train, "fine-tune: full or LoRA"},
    {"score", command_score, "negative log-likelihood of each token of rows"},
    {"generate", command_generate, "one answer"},
    {"tokenize", command_tokenize, "text or chats to ids, ids to text"},
    {"parse", command_parse, "model output to a message"},
    {"chat", command_chat, "a conversation at the terminal"},
    {"serve", command_serve, "an OpenAI-compatible server with a chat page"},
    {"eval", command_eval, "run suites of questions, score saved responses, compare"},
    {"export", command_export, "merge an adapter into a checkpoint, or rewrite an adapter"},
    {"plot", command_plot, "curves of one run or several as SVG"},
    {"bench", command_bench, "time kernels on this machine against its limits"},
};
#define COMMANDS (sizeof commands / sizeof *commands)

static void print_usage(FILE *out) {
    fprintf(out, "lapidary fine-tunes, runs and evaluates Gemma 4 models.\n\nusage: lapidary "
                 "COMMAND [options]\n\n");
    for (size_t i = 0; i < COMMANDS; i++)
        fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].about);
    fprintf(out, "\nlapidary COMMAND --help tells more.\n");
}

/* Threads that wait actively meet at a barrier in under a microsecond, passive ones in twenty;
 * after some tenths of a second without work (a server's, a chat's) they sleep. OpenMP reads its
 * environment when the program is loaded, so the program starts itself once more with it set. */
static void settle_threads(char **argv) {
    if (getenv("OMP_WAIT_POLICY") || getenv("LAPIDARY_SETTLED")) return;
    setenv("OMP_WAIT_POLICY", "active", 0);
    setenv("GOMP_SPINCOUNT", "20000000", 0);
    if (!comm_was_started()) setenv("OMP_PROC_BIND", "true", 0); /* ranks would share processors */
    setenv("LAPIDARY_SETTLED", "1", 1);
    execv("/proc/self/exe", argv); /* where that is not possible, it is only slower */
}

int main(int argc, char **argv) {
    if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") ||
        !strcmp(argv[1], "help")) {
        print_usage(argc < 2 ? stderr : stdout);
        return argc < 2 ? 2 : 0;
    }
    signal(SIGPIPE, SIG_IGN);
    for (size_t i = 0; i < COMMANDS; i++) {
        if (strcmp(commands[i].name, argv[1])) continue;
        settle_threads(argv);
        Status status = commands[i].run(argc - 1, argv + 1);
        if (status == OK) return 0;
        fprintf(stderr, "lapidary: %s\n", status_message());
        return status == ERR_USAGE ? 2 : status == ERR_STOPPED ? 143 : 1;
    }
    fprintf(stderr, "lapidary: unknown command '%s'\n", argv[1]);
    print_usage(stderr);
    return 2;
}
