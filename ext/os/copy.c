/* copy.c - a copy that can be continued, or given up, where it faults.
 *
 * Lives here: one instruction, and the names of its two ends, which the signal
 * handler compares with where a fault happened (fault/handler.c).
 * Invariant: nothing else in this library may fault at these addresses.
 * Runs in: caller, agent, signal handler.
 */
#include "os/os.h"

__asm__(".text\n"
        ".p2align 4\n"
        ".globl ps_copy_bytes, ps_copy_instruction, ps_copy_end\n"
        ".hidden ps_copy_bytes, ps_copy_instruction, ps_copy_end\n"
        ".type ps_copy_bytes, @function\n"
        "ps_copy_bytes:\n"
        "\tmovq %rdx, %rcx\n"
        "\txorl %edx, %edx\n"
        "ps_copy_instruction:\n"
        "\trep movsb\n"
        "ps_copy_end:\n"
        "\tmovq %rcx, %rax\n"
        "\tret\n"
        ".size ps_copy_bytes, .-ps_copy_bytes\n");
