/* A multiboot kernel that goes on to 64-bit mode, and says so. */
        .section .multiboot, "a"
        .align 4
        .long 0x1BADB002, 0, -0x1BADB002

        .text
        .code32
        .global _start
_start: movl $pdpt + 3, pml4            /* present, writable */
        movl $pd + 3, pdpt
        movl $0x83, pd                  /* the first 2 MiB as one page */
        movl $pml4, %eax
        movl %eax, %cr3
        movl %cr4, %eax
        orl $1 << 5, %eax               /* PAE */
        movl %eax, %cr4
        movl $0xC0000080, %ecx          /* EFER */
        rdmsr
        orl $1 << 8, %eax               /* LME */
        wrmsr
        movl %cr0, %eax
        orl $1 << 31, %eax              /* PG */
        movl %eax, %cr0
        lgdt table
        ljmp $8, $wide

        .code64
wide:   movabsq $0x123456789ABCDEF0, %rax
        shrq $60, %rax
        outl %eax, $0xF4
1:      hlt
        jmp 1b

        .data
        .align 8
gdt:    .quad 0, 0x00AF9B000000FFFF
table:  .word 15
        .long gdt
        .bss
        .align 4096
pml4:   .skip 4096
pdpt:   .skip 4096
pd:     .skip 4096
        .section .note.GNU-stack, "", @progbits
