// The little language in which the fuzz guest's operations are written: how a random call's arguments come about.
namespace XenSharp.Guests.Fuzz;

/// <summary>Words in the guest's memory, of which a recipe takes one at random.</summary>
/// <param name="Address">Of the first.</param>
/// <param name="Count">How many.</param>
internal readonly record struct FuzzPool(ulong Address, int Count)
{
    /// <summary>A part of the pool.</summary>
    public FuzzPool Part(int start, int count) => new(Address + ((ulong)start * 8), count);
}

/// <summary>What a step of a recipe does; the interpreter is assembled in <see cref="FuzzGuest"/>.</summary>
internal enum FuzzStep : ulong
{
    /// <summary>The recipe is done.</summary>
    End,

    /// <summary>Adds a constant to the value.</summary>
    Add,

    /// <summary>Adds one of a pool's words.</summary>
    Pick,

    /// <summary>Shifts the value left.</summary>
    Shift,

    /// <summary>Adds random bits under a mask.</summary>
    Random,

    /// <summary>Stores the value at an offset of the call's multicall entry; the next value starts at 0.</summary>
    ToCall,

    /// <summary>The same, into the call's buffer.</summary>
    ToBuffer,

    /// <summary>The same, at an address.</summary>
    ToAddress,

    /// <summary>Adds the address of a place in the call's buffer.</summary>
    BufferAddress,

    /// <summary>With a probability in 65536ths, goes on; else skips bytes of the recipe.</summary>
    Chance,

    /// <summary>Skips bytes of the recipe.</summary>
    Skip,
}

/// <summary>Writes a recipe: values, alternatives, and where they go.</summary>
internal sealed class FuzzRecipe
{
    /// <summary>Words of a step: what, and two operands.</summary>
    public const int StepWords = 3;

    private readonly List<ulong> _code = [];

    /// <summary>The steps with their end.</summary>
    public ulong[] Code => [.. _code, (ulong)FuzzStep.End, 0, 0];

    public FuzzRecipe Constant(ulong value) => Step(FuzzStep.Add, value);

    public FuzzRecipe Pick(FuzzPool pool) => Step(FuzzStep.Pick, pool.Address, (ulong)pool.Count);

    public FuzzRecipe Shift(int distance) => Step(FuzzStep.Shift, (ulong)distance);

    public FuzzRecipe Random(ulong mask) => Step(FuzzStep.Random, mask);

    public FuzzRecipe BufferAddress(int offset) => Step(FuzzStep.BufferAddress, (ulong)offset);

    public FuzzRecipe ToCall(int offset) => Step(FuzzStep.ToCall, (ulong)offset);

    public FuzzRecipe ToBuffer(int offset) => Step(FuzzStep.ToBuffer, (ulong)offset);

    public FuzzRecipe ToAddress(ulong address) => Step(FuzzStep.ToAddress, address);

    /// <summary>One of several ways to go on, by weight.</summary>
    public FuzzRecipe OneOf(params (int Weight, Action<FuzzRecipe> Write)[] ways)
    {
        int left = ways.Sum(static way => way.Weight);
        List<int> ends = [];
        foreach ((int weight, Action<FuzzRecipe> write) in ways)
        {
            int chance = -1;
            if (weight != left)
            {
                chance = _code.Count;
                Step(FuzzStep.Chance, (ulong)((weight * 65536) / left));
            }

            write(this);
            left -= weight;
            if (chance < 0)
                break;
            ends.Add(_code.Count);
            Step(FuzzStep.Skip, 0);
            _code[chance + 2] = (ulong)((_code.Count - chance - StepWords) * 8);
        }

        foreach (int end in ends)
            _code[end + 1] = (ulong)((_code.Count - end - StepWords) * 8);
        return this;
    }

    private FuzzRecipe Step(FuzzStep step, ulong first, ulong second = 0)
    {
        _code.AddRange([(ulong)step, first, second]);
        return this;
    }
}
