// The tiny guest: a whole Xen PV domain in a few hundred bytes of code, one behaviour per image.
using System.Text;
using Iced.Intel;
using XenSharp.Guests.Assembly;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests;

/// <summary>Builds ELF images of the smallest useful PV guests: print a line, then behave or misbehave.</summary>
public static class TinyGuest
{
    const int FloodChunk = 512;
    const int FloodLine = 64;
    const int FloodAlphabet = 94;
    const byte EndOfTransmission = 4;

    /// <summary>The guest that prints its greeting and powers off.</summary>
    public static byte[] Build() => Build(new TinyGuestOptions());

    /// <summary>The guest with these parameters, an ELF64 image for the domain builder.</summary>
    /// <exception cref="ArgumentException">The message is not ASCII, or the flood's length is negative.</exception>
    public static byte[] Build(TinyGuestOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        if (!Ascii.IsValid(options.Message))
            throw new ArgumentException("The tiny guest's message must be ASCII.", nameof(options));
        if (options.FloodBytes < 0)
            throw new ArgumentException($"The console flood cannot be {options.FloodBytes} bytes long.", nameof(options));

        PvAssembler guest = new(options.HypercallStyle);
        PvConsole console = new(guest);
        console.EmitInitialise();
        Print(guest, console, options.Message);
        EmitBehaviour(guest, console, options);
        console.EmitRoutines();
        return guest.Build(new GuestIdentity("xensharp-tiny"));
    }

    /// <summary>The byte at an offset of the console flood: lines of 63 printable characters, each begun one character on.</summary>
    public static byte FloodByte(long offset)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        return offset % FloodLine == FloodLine - 1
            ? (byte)'\n'
            : (byte)('!' + (offset % FloodAlphabet + offset / FloodLine % FloodAlphabet) % FloodAlphabet);
    }

    static void EmitBehaviour(PvAssembler guest, PvConsole console, TinyGuestOptions options)
    {
        Assembler code = guest.Code;
        switch (options.Behaviour)
        {
            case TinyGuestBehaviour.PowerOff:
                guest.Shutdown(GuestShutdownReason.PowerOff);
                break;
            case TinyGuestBehaviour.Reboot:
                guest.Shutdown(GuestShutdownReason.Reboot);
                break;
            case TinyGuestBehaviour.Crash:
                guest.Shutdown(GuestShutdownReason.Crash);
                break;
            case TinyGuestBehaviour.Suspend:
                guest.Shutdown(GuestShutdownReason.Suspend);
                break;
            case TinyGuestBehaviour.Watchdog:
                guest.Shutdown(GuestShutdownReason.Watchdog);
                break;
            case TinyGuestBehaviour.SoftReset:
                guest.Shutdown(GuestShutdownReason.SoftReset);
                break;
            case TinyGuestBehaviour.UndefinedInstruction:
                code.ud2();
                break;
            case TinyGuestBehaviour.SpinForever:
                Label self = code.CreateLabel();
                code.Label(ref self);
                code.jmp(self);
                break;
            case TinyGuestBehaviour.JumpTo:
                code.mov(rax, options.Address);
                code.jmp(rax);
                break;
            case TinyGuestBehaviour.ReadFrom:
                code.mov(rax, options.Address);
                code.mov(rcx, __qword_ptr[rax]);
                Survived(guest, console);
                break;
            case TinyGuestBehaviour.WriteTo:
                code.mov(rax, options.Address);
                code.mov(__qword_ptr[rax], rax);
                Survived(guest, console);
                break;
            case TinyGuestBehaviour.ConsoleFlood:
                EmitFlood(guest, console, options.FloodBytes);
                break;
            case TinyGuestBehaviour.EchoInput:
                EmitEcho(guest, console);
                break;
            default:
                throw new ArgumentException($"The tiny guest does not know the behaviour {options.Behaviour}.", nameof(options));
        }
    }

    static void Print(PvAssembler guest, PvConsole console, string text)
    {
        if (text.Length != 0)
            console.EmitWrite(guest.Define(Encoding.ASCII.GetBytes(text)), text.Length);
    }

    static void Survived(PvAssembler guest, PvConsole console)
    {
        Print(guest, console, "Survived\n");
        guest.Shutdown(GuestShutdownReason.PowerOff);
    }

    static void EmitFlood(PvAssembler guest, PvConsole console, long bytes)
    {
        Assembler code = guest.Code;
        ulong buffer = guest.Reserve(FloodChunk);
        Label chunk = code.CreateLabel();
        Label fill = code.CreateLabel();
        Label sameLine = code.CreateLabel();
        Label inAlphabet = code.CreateLabel();
        Label send = code.CreateLabel();
        Label done = code.CreateLabel();

        code.mov(r13, bytes); // left to write
        code.xor(r14d, r14d); // column
        code.xor(r15d, r15d); // character, counted from '!'
        code.Label(ref chunk);
        code.test(r13, r13);
        code.jz(done);
        code.mov(rdi, buffer);
        code.xor(esi, esi);

        code.Label(ref fill);
        code.lea(eax, __[r15 + '!']);
        code.mov(edx, '\n');
        code.inc(r15d);
        code.inc(r14d);
        code.cmp(r14d, FloodLine);
        code.jne(sameLine);
        code.mov(eax, edx);
        code.xor(r14d, r14d);
        code.inc(r15d);
        code.Label(ref sameLine);
        code.cmp(r15d, FloodAlphabet);
        code.jb(inAlphabet);
        code.sub(r15d, FloodAlphabet);
        code.Label(ref inAlphabet);
        code.mov(__byte_ptr[rdi + rsi], al);
        code.inc(rsi);
        code.dec(r13);
        code.jz(send);
        code.cmp(rsi, FloodChunk);
        code.jne(fill);

        code.Label(ref send);
        console.EmitWriteCall();
        code.jmp(chunk);
        code.Label(ref done);
        guest.Shutdown(GuestShutdownReason.PowerOff);
    }

    static void EmitEcho(PvAssembler guest, PvConsole console)
    {
        const int BufferSize = 256;
        Assembler code = guest.Code;
        ulong buffer = guest.Reserve(BufferSize);
        Label cannot = code.CreateLabel();
        Label line = code.CreateLabel();
        Label character = code.CreateLabel();
        Label keep = code.CreateLabel();
        Label write = code.CreateLabel();
        Label end = code.CreateLabel();

        code.mov(rax, __qword_ptr[console.StartInfoVariable]);
        code.test(__dword_ptr[rax + StartInfoOffset.Flags], StartInfoOffset.FlagInitDomain);
        code.jnz(cannot);
        console.EmitMapSharedInfo();
        code.test(rax, rax);
        code.jnz(cannot);

        code.xor(r14d, r14d); // ^D seen
        code.Label(ref line);
        code.mov(rdi, buffer);
        code.mov(esi, BufferSize);
        console.EmitReadCall();
        code.mov(rdi, buffer);
        code.xor(esi, esi);
        code.Label(ref character);
        code.cmp(rsi, rax);
        code.je(write);
        code.mov(cl, __byte_ptr[rdi + rsi]);
        code.inc(rsi);
        code.lea(edx, __[rcx - 'a']);
        code.cmp(dl, 'z' - 'a');
        code.ja(keep);
        code.sub(cl, 'a' - 'A');
        code.mov(__byte_ptr[rdi + rsi - 1], cl);
        code.Label(ref keep);
        code.cmp(cl, EndOfTransmission);
        code.jne(character);
        code.inc(r14d);
        code.dec(rsi); // the ^D itself is not echoed

        code.Label(ref write);
        console.EmitWriteCall();
        code.test(r14d, r14d);
        code.jz(line);
        code.jmp(end);

        code.Label(ref cannot);
        guest.Shutdown(GuestShutdownReason.Crash);
        code.Label(ref end);
        guest.Shutdown(GuestShutdownReason.PowerOff);
    }
}
