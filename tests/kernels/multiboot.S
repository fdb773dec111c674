/* A multiboot header, and the way from the loader to main(magic, info). */
        .section .multiboot, "a"
        .align 4
        .long 0x1BADB002
        .long 0x3                       /* page-aligned modules, memory information */
        .long -(0x1BADB002 + 0x3)

        .text
        .global _start
_start: movl $stack_top, %esp
        pushl %ebx
        pushl %eax
        call main
1:      hlt
        jmp 1b

        .bss
        .align 16
        .skip 16384
stack_top:
        .section .note.GNU-stack, "", @progbits
