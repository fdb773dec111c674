/* The smallest kernel that does something: it is loaded by multiboot, says hello on COM1, and ends
   the run. Build it with

     gcc -m32 -c hello.S && ld -m elf_i386 -Ttext 0x100000 -o hello.elf hello.o
*/
        .text
        .global _start

        /* The header (Multiboot Specification 3.1): in the file's first 8 KiB, the sum is 0. */
        .align 4
        .long 0x1BADB002                /* magic */
        .long 0                         /* flags: no demands */
        .long -0x1BADB002               /* checksum */

        /* 32-bit protected mode, flat segments, interrupts off; EBX: what the loader has to say. */
_start: movl $text, %esi
next:   lodsb
        testb %al, %al
        jz done
        movw $0x3F8, %dx                /* the UART's transmitter is always ready here */
        outb %al, %dx
        jmp next

done:   movb $3, %al
        outb %al, $0xF4                 /* exit status (3 << 1) | 1 */
        hlt

text:   .asciz "Hello from ring 0.\n"
