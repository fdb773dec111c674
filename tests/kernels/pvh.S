/* A PVH entry point, and the way from the loader to main(0, info). */
        .section .note.Xen, "a", @note
        .align 4
        .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long entry

        .text
        .global _start
_start: ud2                             /* the ELF header's entry point is another's */
entry:  movl $stack_top, %esp
        pushl %ebx
        pushl $0
        call main
1:      hlt
        jmp 1b

        .bss
        .align 16
        .skip 16384
stack_top:
        .section .note.GNU-stack, "", @progbits
